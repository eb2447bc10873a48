"""Time of one weight per tensor and per row, around zero and around a base, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from contestants import DTYPES, random_group
from rows import Row, interleave, timed_rows

from mergekit_karcher import karcher_mean

TENSOR, ROW, BASE, ROW_BASE = "tensor", "row", "tensor, base", "row, base"


def geometries(side: int, models: tuple[int, ...], rounds: int) -> Iterator[Row]:
    """N fine-tunes of one weight; the base is one more tensor that is read."""
    for dtype in ("bf16", "fp32"):
        for count in models:
            *tensors, base = random_group("fine-tunes", count + 1, (side, side), DTYPES[dtype])
            options: dict[str, dict[str, Any]] = {
                TENSOR: {},
                ROW: {"granularity": "row"},
                BASE: {"base": base},
                ROW_BASE: {"base": base, "granularity": "row"},
            }
            calls = {
                name: partial(_timed, partial(karcher_mean, tensors, **own))
                for name, own in options.items()
            }
            for call in calls.values():
                call()
            seconds = interleave(calls, dict.fromkeys(calls, rounds))
            case = {"tensors": f"{side} x {side}", "dtype": dtype, "models": count}
            yield from timed_rows("geometries", case, seconds, {name: {} for name in calls})


def _timed(call: Callable[[], tuple[torch.Tensor, Any]]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
