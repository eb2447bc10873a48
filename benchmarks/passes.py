"""Our two passes over a weight against the speed of memory and against linear, in one thread."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from contestants import DTYPES, LINEAR, OURS, linear, random_group
from rows import Row, interleave, timed_rows

from mergekit_karcher.kernels.combine import combine
from mergekit_karcher.kernels.gram import Precision, grams
from mergekit_karcher.means.autograd import merge
from mergekit_karcher.means.inputs import checked_inputs
from mergekit_karcher.means.solve import Settings

SUM, GRAM, COMBINE = "torch.sum", "Gram pass", "combining"
DOUBLE_GRAM = "Gram pass in float64"
CONVERSION = "conversion to float32 in the cache"

# glibc's numbers of what mallopt sets, its defaults, and what keeps memory that was freed.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 << 10, _MMAP_MAX: 65536}
_KEEPS = {_TRIM_THRESHOLD: (1 << 31) - 1, _MMAP_MAX: 0}

_PRECISIONS = {"bf16": Precision.SINGLE, "fp32": Precision.DOUBLE}

# Values that are converted at once, about as many as a cache holds.
_CHUNK = 1 << 16


def passes(side: int, rounds: int) -> Iterator[Row]:
    """Each pass alone, and both as a merge, with new pages for every result and with kept ones.

    The Gram pass of a merge is in float32 for 16-bit inputs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for pages in ("new", "kept"):
            with _pages(kept=pages == "kept"):
                for dtype in ("bf16", "fp32"):
                    for count in (3, 5, 10):
                        group = random_group("fine-tunes", count, (side, side), DTYPES[dtype])
                        shares = np.full(count, 1 / count)
                        calls: dict[str, Callable[[], object]] = {
                            SUM: partial(_sums, group),
                            CONVERSION: partial(_convert, group),
                            GRAM: partial(grams, group, precision=_PRECISIONS[dtype]),
                            DOUBLE_GRAM: partial(grams, group),
                            COMBINE: partial(combine, group, shares, DTYPES[dtype]),
                            LINEAR: partial(linear, group),
                            OURS: partial(_merge, group),
                        }
                        timers = {name: partial(_seconds, call) for name, call in calls.items()}
                        seconds = interleave(timers, dict.fromkeys(timers, rounds))
                        case = {"pages": pages, "dtype": dtype, "models": count}
                        yield from timed_rows(
                            "passes", case, seconds, {name: {} for name in timers}
                        )
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _pages(*, kept: bool) -> Iterator[None]:
    """Have glibc keep freed memory for what comes next; otherwise leave it as it is."""
    if not kept:
        yield
        return
    libc = ctypes.CDLL(None)
    for what, value in _KEEPS.items():
        libc.mallopt(what, value)
    try:
        yield
    finally:
        for what, value in _DEFAULTS.items():
            libc.mallopt(what, value)
        libc.malloc_trim(0)


def _seconds(call: Callable[[], object]) -> float:
    call()
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _merge(group: list[torch.Tensor]) -> None:
    merge(checked_inputs("the tensor", group), Settings(for_output=True))


def _sums(group: list[torch.Tensor]) -> None:
    for tensor in group:
        tensor.sum()


def _convert(group: list[torch.Tensor]) -> None:
    buffers = list(torch.empty(len(group), _CHUNK))
    flat = [tensor.view(-1) for tensor in group]
    for start in range(0, len(flat[0]), _CHUNK):
        parts = [tensor[start : start + _CHUNK] for tensor in flat]
        torch._foreach_copy_([buffer[: len(parts[0])] for buffer in buffers], parts)
