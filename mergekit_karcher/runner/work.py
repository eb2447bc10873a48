"""What a worker does: one unit of a merge, in whatever process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_karcher.host.merging import Recipe, plan
from mergekit_karcher.host.planned import PlannedMerge, Unit
from mergekit_karcher.runner.inputs import read_ahead
from mergekit_karcher.runner.manifest import check_inputs, stored_manifest
from mergekit_karcher.runner.output import doing
from mergekit_karcher.runner.records import DONE, Record, load, store
from mergekit_karcher.runner.shards import ShardWriter, is_whole


@dataclass(frozen=True)
class Job:
    """The part that is the same for all units of a merge.

    recipe: what to merge. folder: where records go, and below it what mergekit is told to save to.
    threads: how many torch may use.
    """

    recipe: Recipe
    folder: Path
    threads: int


# The merges that this process has planned, or inherited from the one that started it.
_planned: dict[Recipe, PlannedMerge] = {}


def keep(recipe: Recipe, merge: PlannedMerge) -> None:
    """Have processes that are forked from this one do without planning."""
    _planned[recipe] = merge


def forget(recipe: Recipe) -> None:
    """Let go of a plan that this process keeps."""
    _planned.pop(recipe, None)


def do_unit(job: Job, name: str, mean: Any) -> Record:
    """Do a unit, or find that it is done.

    Arguments:
        job: What the unit is part of; planned at the first unit in a process.
        name: The name of the unit.
        mean: The mean of whole models, if there is one and it is known.

    Returns:
        What is now on disk.

    Raises:
        OSError: If a file cannot be read or written.
        KarcherError: If an input is no longer what the merge was begun with.
        Exception: Whatever mergekit or a merge method raises.
    """
    torch.set_num_threads(job.threads)
    if job.recipe not in _planned:
        _planned[job.recipe] = plan(job.recipe)
    merge = _planned[job.recipe]
    merge.know_mean(mean)
    unit = next(unit for unit in merge.units if unit.name == name)
    with doing(name, job.folder):
        path = job.folder / f"{name}{DONE}"
        record = load(path)
        if record is None or not _still_stands(record, job.recipe.out / name):
            record = _do(job, merge, unit)
            store(record, path)
    return record


def _do(job: Job, merge: PlannedMerge, unit: Unit) -> Record:
    if unit.whole_model:
        record = _take_products(merge, unit)
    else:
        record = _save(job.recipe.out / unit.name, merge, unit)
    # What came of a spoilt input must not be kept: the input may be mended before the next run.
    check_inputs(stored_manifest(job.folder), set(_files(merge, unit)))
    return record


def _files(merge: PlannedMerge, unit: Unit) -> Iterator[Path]:
    for place in unit.places:
        yield from (path for path, _ in merge.reads(place, whole_model=unit.whole_model))


def _still_stands(record: Record, shard: Path) -> bool:
    return record.written is None or is_whole(shard, record.written)


def _take_products(merge: PlannedMerge, unit: Unit) -> Record:
    products = tuple(_one_by_one(merge, unit, merge.products))
    return Record(None, _tally_of(merge), products)


def _save(path: Path, merge: PlannedMerge, unit: Unit) -> Record:
    with ShardWriter(path, [merge.name(place) for place in unit.places]) as writer:
        for place, tensor in zip(unit.places, _one_by_one(merge, unit, merge.tensor), strict=True):
            if tensor is not None:
                writer.add(merge.name(place), tensor)
            del tensor
        written = writer.finish()
    return Record(written, _tally_of(merge))


def _one_by_one(merge: PlannedMerge, unit: Unit, result: Callable[[int], Any]) -> Any:
    """The result of each place, while the disk reads what the next one needs."""
    read_ahead(merge.reads(unit.places[0], whole_model=unit.whole_model))
    for place, following in zip(unit.places, (*unit.places[1:], None), strict=True):
        if following is not None:
            read_ahead(merge.reads(following, whole_model=unit.whole_model))
        yield result(place)


def _tally_of(merge: PlannedMerge) -> Any:
    return None if merge.run is None else merge.run.handed_over()
