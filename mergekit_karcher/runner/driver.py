"""A merge from its recipe to a folder that is whole: planned, done in units, gone on with."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.files import PARTIAL
from mergekit_karcher.host.merging import Recipe, carry_out, plan
from mergekit_karcher.host.planned import PlannedMerge, Unit
from mergekit_karcher.runner import capacity, output
from mergekit_karcher.runner.capacity import threads_a_worker, worker_count
from mergekit_karcher.runner.cluster import RayWorkers
from mergekit_karcher.runner.estimate import describe, estimate
from mergekit_karcher.runner.local import LocalWorkers, ThisProcess
from mergekit_karcher.runner.manifest import (
    begin_or_go_on,
    check_inputs,
    config_hash,
    manifest_of,
)
from mergekit_karcher.runner.progress import Progress
from mergekit_karcher.runner.records import DONE, Record
from mergekit_karcher.runner.work import Job, keep

# Workers lost one after the other, with no unit done in between, that are replaced.
_LOSSES = 3

_SECONDS = 0.3

# What the system says where a disk, or a user's share of it, is full.
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Settings:
    """How a merge is done.

    workers: processes of this machine; None for what cores and memory allow. ray: the address of a
    Ray cluster, or None. overwrite: whether to replace what is in the output folder. as_json,
    quiet: how to show progress. dry_run: whether to plan, check and describe the merge, and no
    more. in_process: whether this process does all of it, with all of its threads; a process that
    runs networks, too, cannot be forked.
    """

    workers: int | None = None
    ray: str | None = None
    overwrite: bool = False
    as_json: bool = False
    quiet: bool = False
    dry_run: bool = False
    in_process: bool = False


def merge(source: str, out: Path, options: Any, settings: Settings) -> None:
    """Merge models into a folder, or go on where an earlier run was stopped.

    Arguments:
        source: A config of mergekit-yaml, as text.
        out: The output folder. What is done stays in `.merge` within it until all is done.
        options: mergekit's `MergeOptions`.
        settings: How.

    Raises:
        KarcherError: For what the user can mend; what is done by then is kept.
    """
    out = out.absolute()
    work = out / output.WORK
    recipe = Recipe(source, work / out.name, options, Path.cwd())
    cores = capacity.cores()
    if settings.dry_run:
        if not settings.overwrite:
            output.check_free(out)
        _describe(recipe, cores, settings)
        return
    try:
        with output.in_use(out) as work:
            _merge_or_publish(_Run(recipe, work, cores, settings))
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _explained(error, out) from error


def _merge_or_publish(run: _Run) -> None:
    """Do what is left to do of a merge, in a folder that no other run has."""
    recipe, work = run.recipe, run.work
    config = config_hash(recipe)
    left = output.to_publish(work)
    if left is not None:
        output.publish(left[1], work, left[0])
        if left[0] == config:
            return
    if not run.settings.overwrite:
        output.check_free(work.parent)
    if not run.settings.in_process:
        # A process that has started threads of OpenMP cannot be forked.
        torch.set_num_threads(1)
    missing = recipe.to_fetch()
    if missing:
        with recipe.by_headers(missing):
            _check(recipe, plan(recipe))
    _merge(run)
    output.publish(recipe.out, work, config)


def _describe(recipe: Recipe, cores: int, settings: Settings) -> None:
    """Plan and check a merge, and print what it would take."""
    missing = recipe.to_fetch()
    with recipe.by_headers(missing):
        planned = plan(recipe)
        _check(recipe, planned)
        threads = threads_a_worker(planned, cores, recipe.options)
        workers = settings.workers or worker_count(planned, cores, threads, recipe.options)
        for line in describe(planned, workers):
            click.echo(line)
        if missing:
            click.echo(f"To be fetched from the Hub first: {', '.join(missing)}.")
        else:
            click.echo(estimate(planned, workers, threads))


def _check(recipe: Recipe, planned: PlannedMerge) -> None:
    """Raise `KarcherError` if an input is not whole, or the result does not fit on the disk."""
    manifest_of(recipe, planned)
    output.check_space(recipe.out, sum(u.bytes for u in planned.units if not u.whole_model))


def _merge(run: _Run) -> None:
    try:
        carry_out(run.recipe, run.execute)
    except KarcherError:
        raise
    except Exception as error:
        if not run.is_done or getattr(error, "errno", None) in _FULL:
            raise
        raise KarcherError(
            "All tensors are merged, but mergekit could not write the config, the tokenizer or the "
            f"model card ({first_line(error)}): run the same command again when that is mended, "
            "with --no-write-model-card if the Hub cannot be reached."
        ) from error


class _Run:
    """The tensors of one merge.

    recipe, work, settings: what to merge, the working folder, and how it is done. is_done: whether
    all of them are on disk.
    """

    def __init__(self, recipe: Recipe, work: Path, cores: int, settings: Settings) -> None:
        self.recipe, self.work, self.settings = recipe, work, settings
        self._cores = cores
        self._manifest: dict[str, Any] = {}
        self.is_done = False

    def execute(self, merge: PlannedMerge) -> None:
        """Do all units of a plan, and write the index and the report."""
        threads = self._cores
        if not self.settings.in_process:
            threads = threads_a_worker(merge, self._cores, self.recipe.options)
        job = Job(self.recipe, self.work, threads)
        self._manifest = manifest_of(job.recipe, merge)
        if self.settings.overwrite:
            try:
                begin_or_go_on(self._manifest, job.folder)
            except KarcherError:
                output.begin_anew(job.folder)
        begin_or_go_on(self._manifest, job.folder)
        job.recipe.out.mkdir(exist_ok=True)
        done = [unit for unit in merge.units if (job.folder / f"{unit.name}{DONE}").is_file()]
        left = sum(unit.bytes for unit in merge.units if unit not in done and not unit.whole_model)
        output.check_space(job.recipe.out, left)
        keep(job.recipe, merge)
        workers = self._workers(job, merge)
        title = job.folder.parent.name
        total = sum(unit.bytes for unit in merge.units)
        initial = sum(unit.bytes for unit in done)
        progress = Progress(
            total, title, initial, as_json=self.settings.as_json, quiet=self.settings.quiet
        )
        try:
            shards = self._do_all(merge, workers, _Watch(job, merge.units, done, progress))
        finally:
            progress.close()
            workers.stop()
            output.delete_partial(job.folder)
        check_inputs(self._manifest)
        output.write_index(job.recipe.out, shards)
        if merge.report is not None:
            merge.report.execute()
        self.is_done = True

    def _do_all(self, merge: PlannedMerge, workers: Any, watch: _Watch) -> list[tuple[str, Any]]:
        """Do all units; the shards, and what was written to each."""
        records: dict[str, Record] = {}
        mean = None
        for whole_model in (True, False):
            units = [unit for unit in merge.units if unit.whole_model is whole_model]
            for unit, record in self._do(units, workers, mean, watch):
                records[unit.name] = record
            if whole_model and units:
                mean = merge.take_mean(p for unit in units for p in records[unit.name].products)
        for unit in merge.units:
            tally = records[unit.name].tally
            if merge.run is not None and tally is not None:
                merge.run.tally.absorb(tally)
        return [
            (unit.name, records[unit.name].written) for unit in merge.units if not unit.whole_model
        ]

    def _do(
        self, units: Sequence[Unit], workers: Any, mean: Any, watch: _Watch
    ) -> Iterator[tuple[Unit, Record]]:
        waiting = {workers.submit(unit.name, mean): unit for unit in units}
        losses = 0
        while waiting:
            finished, _ = wait(waiting, _SECONDS, FIRST_COMPLETED)
            watch.show()
            lost = []
            for future in finished:
                unit = waiting.pop(future)
                try:
                    record = future.result()
                except BrokenProcessPool:
                    lost.append(unit)
                except Exception as error:
                    check_inputs(self._manifest)
                    raise _explained(error, self.work.parent) from error
                else:
                    losses = 0
                    watch.count(unit)
                    yield unit, record
            if lost:
                check_inputs(self._manifest)
                losses += 1
                if losses > _LOSSES:
                    raise KarcherError(
                        f"{losses} workers were lost one after the other while they merged "
                        f"{lost[0].name}, perhaps for want of memory: run the same command with "
                        "fewer --workers to go on."
                    )
                lost += waiting.values()
                workers.renew()
                waiting = {workers.submit(unit.name, mean): unit for unit in lost}

    def _workers(self, job: Job, merge: PlannedMerge) -> LocalWorkers | RayWorkers | ThisProcess:
        settings, options, threads = self.settings, self.recipe.options, job.threads
        if settings.in_process:
            return ThisProcess(job)
        if settings.ray is not None:
            return RayWorkers(job, settings.ray)
        gpus = torch.cuda.device_count() if options.multi_gpu else 0
        count = settings.workers or gpus or worker_count(merge, self._cores, threads, options)
        if not settings.quiet:
            click.echo(
                f"{_counted(count, 'worker')} of {_counted(threads, 'thread')}, "
                f"{_counted(len(merge.units), 'unit')}.",
                err=True,
            )
        return LocalWorkers(job, count, own_gpus=gpus > 0)


class _Watch:
    """Tells how much is done by the sizes of files, wherever they are written from."""

    def __init__(
        self, job: Job, units: Sequence[Unit], done: Sequence[Unit], progress: Progress
    ) -> None:
        self._folder, self._progress = job.recipe.out, progress
        self._bytes = {unit.name: unit.bytes for unit in units}
        self._done = {unit.name for unit in done}

    def count(self, unit: Unit) -> None:
        """Count a unit that is done."""
        self._done.add(unit.name)
        self.show()

    def show(self) -> None:
        """Show how much is done."""
        partial = sum(map(_size_of, self._folder.glob(f"*{PARTIAL}")))
        self._progress.show(sum(self._bytes[name] for name in self._done) + partial)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # It has got its final name in the meantime.
        return 0


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _explained(error: Exception, out: Path) -> Exception:
    """What to tell of an error of a worker."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):  # Ray wraps what a task raises.
        error = cause
    goes_on = "run the same command again to go on"
    if isinstance(error, OSError) and error.errno in _FULL:
        return KarcherError(f"The disk of {out} is full: free some space, and {goes_on}.")
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        return KarcherError(
            f"A file{where} could not be read or written ({error.strerror or first_line(error)}): "
            f"{goes_on} when that is mended."
        )
    return error
