"""Summing over examples, in a run that can be interrupted and goes on where it was."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import replacing
from mergekit_karcher.metrics.diagonal import DiagonalFisher
from mergekit_karcher.metrics.examples import Example, batches

# The sums so far, in the folder of a metric that is not finished.
SUMS_FILE = "partial.safetensors"

# What is lost at most when a run is cut off.
_SECONDS_BETWEEN_SAVES = 120


def accumulate(
    fisher: DiagonalFisher,
    examples: Sequence[Example],
    folder: Path,
    decisive: Mapping[str, Any],
    *,
    batch_size: int,
    seed: int | None,
    quiet: bool,
) -> None:
    """Add all examples, sorted by length, to the sums; go on with those that an earlier run saved.

    The sums are saved in the folder every two minutes, at Ctrl-C and at the end. `decisive` is all
    that decides them, as JSON can hold it. With a seed the targets are drawn from the model.
    Raises KarcherError if the folder holds the sums of a run with another `decisive`, if a gradient
    is not finite, or after Ctrl-C, at the end of a batch.
    """
    path = folder / SUMS_FILE
    if path.exists():
        _resume(path, fisher, decisive)
    total, last_save = len(examples), time.monotonic()
    bar = tqdm(total=total, initial=fisher.examples, desc="Fisher", unit="example", disable=quiet)
    with bar, _stop_requests() as requests:
        for batch in batches(examples[fisher.examples :], batch_size):
            sampler = None
            if seed is not None:
                # By place, so that a run that goes on draws what it would have drawn.
                sampler = torch.Generator(fisher.device).manual_seed(seed + fisher.examples)
            fisher.add(batch, sampler)
            bar.update(len(batch.ids))
            if fisher.examples == len(batch.ids):
                fisher.check()
            if requests or time.monotonic() - last_save > _SECONDS_BETWEEN_SAVES:
                _save(path, fisher, decisive)
                last_save = time.monotonic()
            if requests:
                raise KarcherError(
                    f"Stopped after {fisher.examples} of {total} examples, which are kept in "
                    f"{folder}: run the same command again to go on."
                )
    _save(path, fisher, decisive)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect the first Ctrl-C, so that a batch can be finished; a second one stops at once."""
    requests: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _frame: Any) -> None:
        requests.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield requests
    finally:
        signal.signal(signal.SIGINT, before)


def _save(path: Path, fisher: DiagonalFisher, decisive: Mapping[str, Any]) -> None:
    fisher.check()
    metadata = {"state": json.dumps(decisive), "examples": str(fisher.examples)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file(fisher.squares, partial, metadata)


def _resume(path: Path, fisher: DiagonalFisher, decisive: Mapping[str, Any]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        before, now = json.loads(metadata["state"]), json.loads(json.dumps(decisive))
        differences = [key for key in now if now[key] != before.get(key)]
        if differences:
            raise KarcherError(
                f"{path} is of a run with other {', '.join(differences)}: name a new folder by "
                "--out, or delete that file."
            )
        for name, squares in fisher.squares.items():
            squares.copy_(file.get_tensor(name))
    fisher.examples = int(metadata["examples"])
