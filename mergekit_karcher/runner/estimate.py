"""What a merge would take, by its plan and by merging a few of its tensors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from mergekit_karcher.host.planned import PlannedMerge, Unit

# How many tensors are merged to see how long they take, and when to be content with fewer.
_TENSORS = 8
_SECONDS = 10


def describe(merge: PlannedMerge, workers: int) -> Iterator[str]:
    """Lines for a person: the units, the bytes and the memory."""
    yield f"{len(merge.units)} units, each done as a whole:"
    for unit in merge.units:
        what = "inner products of " if unit.whole_model else ""
        yield f"  {unit.name}: {what}{len(unit.places)} tensors, {_size(unit.bytes)}"
    written = sum(unit.bytes for unit in merge.units if not unit.whole_model)
    yield f"Reads {_size(merge.bytes_to_read())}, writes {_size(written)}."
    each = "the worker" if workers == 1 else f"each of {workers} workers"
    yield f"Memory for {each}: {_size(merge.memory())} for tensors, beside about 0.5 GB."


def estimate(merge: PlannedMerge, workers: int, threads: int) -> str:
    """A line for a person on how long a merge takes."""
    seconds = _seconds(merge, threads) / workers
    return (
        f"About {_duration(seconds)} to read and merge, going by a few tensors; writing goes on "
        "beside it, as fast as the disk."
    )


def _seconds(merge: PlannedMerge, threads: int) -> float:
    """How long one worker would take to read and merge everything."""
    torch.set_num_threads(threads)
    units = [unit for unit in merge.units if unit.whole_model]
    passes = 2 if units else 1
    units = units or merge.units
    make = merge.products if passes == 2 else merge.tensor
    total = sum(unit.bytes for unit in units)
    done, begin = 0, 0.0
    for place, size in _sample(units):
        if not begin:  # The first one pays for what is imported and started only once.
            make(place)
            begin = time.perf_counter()
        make(place)
        done += size
        if time.perf_counter() - begin > _SECONDS:
            break
    return passes * (time.perf_counter() - begin) * total / max(done, 1)


def _sample(units: Sequence[Unit]) -> Iterator[tuple[int, int]]:
    """Places and sizes of a few tensors, those that hold bytes evenly spread over all of them."""
    tensors = [pair for unit in units for pair in zip(unit.places, unit.sizes, strict=True)]
    tensors.sort(key=lambda pair: pair[1])
    step = sum(size for _, size in tensors) / _TENSORS
    passed = 0
    following = step / 2
    for place, size in tensors:
        passed += size
        if passed > following:
            yield place, size
            following = passed + step / 2


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.2g} hours"
    return f"{seconds / 60:.2g} minutes" if seconds >= 100 else f"{seconds:.2g} seconds"
