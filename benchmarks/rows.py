"""What a benchmark row is: a case, a contestant, what was measured, and where and when."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch

Row = dict[str, Any]
Seconds = Mapping[str, Mapping[int, float]]  # by contestant and round
T = TypeVar("T")

_PACKAGES = ("torch", "numpy", "mergekit", "mergekit-karcher")


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


# Looked up before anything sets another number of threads.
_MACHINE = _machine()


def row(section: str, case: Mapping[str, Any], contestant: str, result: Mapping[str, Any]) -> Row:
    """A measurement, with the machine, the versions and the load that it was taken under."""
    return {
        "section": section,
        "case": dict(case),
        "contestant": contestant,
        "result": dict(result),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": _MACHINE,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
    }


def timed_rows(
    section: str, case: Mapping[str, Any], seconds: Seconds, more: Mapping[str, Mapping[str, Any]]
) -> Iterator[Row]:
    """A row for each contestant: quantiles of its seconds, and of its time over each rival's.

    A quotient is taken within a round. more: what else each row is to say.
    """
    for name, own in seconds.items():
        over = {
            rival: quantiles([own[turn] / theirs[turn] for turn in own.keys() & theirs.keys()])
            for rival, theirs in seconds.items()
            if rival != name
        }
        times = {"seconds": quantiles(list(own.values())), "over": over}
        yield row(section, case, name, times | dict(more[name]))


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median, 90 % quantile and number of values."""
    low, middle, high = (float(f"{value:.4g}") for value in np.quantile(values, [0, 0.5, 0.9]))
    return {"min": low, "median": middle, "p90": high, "rounds": len(values)}


def interleave(
    calls: Mapping[str, Callable[[], T]], rounds: Mapping[str, int]
) -> dict[str, dict[int, T]]:
    """Results by contestant and round.

    In each round every contestant runs once, a different one first each time. One with fewer rounds
    than the others sits some out, evenly spread; all run in the first.
    """
    most = max(rounds.values())
    results: dict[str, dict[int, T]] = {name: {} for name in calls}
    for turn in range(most):
        names = list(calls)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn * rounds[name] % most < rounds[name]:
                results[name][turn] = calls[name]()
    return results
