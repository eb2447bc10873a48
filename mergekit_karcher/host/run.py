"""The state of one merge: what it has merged and met so far, and the lines that sum it up."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import click
import numpy as np

from mergekit_karcher.host.tally import CHANGES, MODELS, Tally
from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.report.observation import Observation
from mergekit_karcher.sphere.results import SphereMeans, Status
from mergekit_karcher.sphere.trig import Floats

_LOG = logging.getLogger(__name__)

_NAMES_SHOWN = 5

# The methods whose merges are summed up.
KARCHER, FISHER = "karcher", "fisher"

# What the second is called in a config; by the second name it takes input Grams only.
REGMEAN = "regmean"
FISHER_NAMES = (FISHER, REGMEAN)

# The command of ours that merges.
MERGE_COMMAND = "merge"


class MergeRun:
    """One merge: made when it is planned, carried by its tasks, safe to use from any thread.

    Equal only to itself, so that the tasks that carry it are told apart by the merge they are of.

    Arguments:
        title: What the merge is called in its summary.
        method: `KARCHER`, or one of `FISHER_NAMES`.
        watched: Whether to keep what a report needs.
        names: For each output tensor that is to be merged, what each model that takes part calls
            it, by model.

    settings, left_out: Lines of the summary that say which weights and settings are in effect, and
    what the result lacks.
    tally: What the tensors merged so far come to.
    """

    def __init__(
        self,
        title: str,
        method: str = KARCHER,
        *,
        watched: bool = False,
        names: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.title, self.method, self.watched = title, method, watched
        self._names = names or {}
        self._lock = threading.Lock()
        self.settings: Sequence[str] = ()
        self.left_out: Sequence[str] = ()
        self.tally = Tally()
        self._warned_of_16_bits = False

    def label(self, name: str, model: str) -> str:
        """A model, and its name for an output tensor where slices make the two differ."""
        name_there = self._names.get(name, {}).get(model, name)
        return model if name_there == name else f"{model} (there {name_there})"

    def observe(self, observation: Observation) -> None:
        """Keep an observation for the report."""
        with self._lock:
            self.tally.observations[observation.name] = observation

    def compare(self, name: str, size: int, angles: Iterable[float], *, around_base: bool) -> None:
        """Count the angles between the inputs of a tensor, NaN where one has no direction."""
        what = CHANGES if around_base else MODELS
        with self._lock:
            self.tally.apart[what].add(name, size, (a for a in angles if not math.isnan(a)))

    def weigh(self, name: str, shares: Floats) -> None:
        """Keep for the report how much each input of a tensor counts."""
        with self._lock:
            self.tally.shares[name] = shares

    def record(
        self, name: str, mean: KarcherMean | None, present: int, blocks: Sequence[SphereMeans] = ()
    ) -> None:
        """Count a merged tensor.

        Arguments:
            name: The output tensor.
            mean: Its Karcher mean, if it has one.
            present: How many of the models that take part have the tensor.
            blocks: The means of its rows, where it has its own mean.
        """
        with self._lock:
            self.tally.merged += 1
            if present < len(self._names.get(name, ())):
                self.tally.incomplete.append(name)
            if mean is None:
                return
            if self.watched:
                self.tally.means[name] = mean
            statuses = [status for block in blocks for status in block.statuses] or [mean.status]
            unique = [bool(one) for block in blocks for one in block.unique] or [mean.unique]
            fell_back = [status is Status.NOT_UNIQUE for status in statuses]
            unproven = [not (u or fell) for u, fell in zip(unique, fell_back, strict=True)]
            unfinished = [status is Status.NOT_CONVERGED for status in statuses]
            for what, of_rows in zip(
                self.tally.flagged.values(), (unproven, fell_back, unfinished), strict=True
            ):
                if any(of_rows):
                    what[name] = (sum(of_rows), len(of_rows))

    def note_zero_metrics(self, name: str) -> None:
        """Remember a tensor whose metrics are zero in every model; warn of the first."""
        what = "metrics zero in every model, merged as without any"
        if what not in self.tally.noted:
            _LOG.warning(
                "The metrics of %s are zero in every model: it is merged as without any, "
                "and so are others like it.",
                name,
            )
        self.note(what, name)

    def note(self, what: str, name: str) -> None:
        """Remember a tensor for a line of the summary that begins with those words."""
        with self._lock:
            self.tally.noted.setdefault(what, []).append(name)

    def note_own_changes(self, models: Sequence[str], changes: Floats, base: float) -> None:
        """Count a layer merged in the metrics of its changes from the base.

        changes, base: The length of each model's change, (N,), and that of the base.
        """
        with self._lock:
            self.tally.in_own_changes += 1
            for model, change in zip(models, changes, strict=True):
                self.tally.add_lengths(model, np.array([change, base]) ** 2)

    def note_tokens_without_base(self, name: str, count: int) -> None:
        """Remember how many tokens of a tensor the base does not have."""
        with self._lock:
            self.tally.tokens_without_base[name] = count

    def warn_of_16_bits(self, name: str, dtypes: Iterable[str]) -> None:
        """Say once that differences of what arrives in 16 bits are mostly rounding."""
        narrow = sorted(dtype for dtype in dtypes if dtype in ("torch.float16", "torch.bfloat16"))
        with self._lock:
            if not narrow or self._warned_of_16_bits:
                return
            self._warned_of_16_bits = True
        _LOG.warning(
            "origin: base takes differences of tensors that arrive as %s (%s is the first): those "
            "of close fine-tunes are then mostly rounding. If the files hold more, use dtype: "
            "float32 with out_dtype: bfloat16.",
            narrow[0].removeprefix("torch."),
            name,
        )

    def handed_over(self) -> Tally:
        """The tally so far, which begins anew."""
        with self._lock:
            tally, self.tally = self.tally, Tally()
            return tally

    def lines(self) -> Iterator[str]:
        """The summary, the settings, and at most one line of names for each thing to look at."""
        tally = self.tally
        merged = f"{self.method} {self.title}: {tally.merged} tensors merged"
        apart = [f"{what} {words}" for what, a in tally.apart.items() if (words := a.words)]
        if tally.in_own_changes:
            layers = f"{tally.in_own_changes} of them in the metrics of their changes"
            yield f"{', '.join([merged, layers, *apart])}."
        elif self.method != KARCHER:
            yield f"{merged}, each parameter weighed by the metrics of its models."
        else:
            counts = [f"{_count(flagged)} {what}" for what, flagged in tally.flagged.items()]
            yield f"{', '.join([merged, *apart, *counts])}."
        yield from (f"  {line}" for line in (*self.settings, *self.left_out))
        yield from self._unrelated()
        for what, noted in tally.noted.items():
            yield f"  {what}: {_listed(noted)}"
        for what, flagged in tally.flagged.items():
            if flagged:
                names = _listed([_with_rows(name, *of) for name, of in flagged.items()])
                yield f"  {what}: {names}"
        for name, count in sorted(tally.tokens_without_base.items()):
            yield f"  tokens that the base lacks, merged by the linear mean: {count} of {name}"
        if tally.incomplete:
            names = _listed(tally.incomplete)
            yield f"  missing from some models, merged from those that have them: {names}"

    def _unrelated(self) -> Iterator[str]:
        """A line for each model whose changes are longer than the base is."""
        for model, (change, base) in self.tally.lengths.items():
            if change > base:
                times = math.sqrt(change / base) if base else math.inf
                yield (
                    f"  {model} is as far from the base as unrelated models are, its changes are "
                    f"{times:.2g} times as long: metric: self is for fine-tunes of the base"
                )


def _count(flagged: Mapping[str, tuple[int, int]]) -> str:
    """How many there are: rows where a tensor has several, or else tensors."""
    count = sum(rows for rows, _ in flagged.values())
    if all(of == 1 for _, of in flagged.values()):
        return str(count)
    return f"{count} row{'' if count == 1 else 's'}"


def _with_rows(name: str, rows: int, of: int) -> str:
    return name if of == 1 else f"{name} ({rows} of {of} rows)"


def announce(run: MergeRun) -> None:
    """Have the summary of a merge printed when a command that merges ends well.

    A line printed during the merge would land on the progress bar. Nothing is printed under
    --quiet or --dry-run, after a failure, or outside of those commands.
    """
    context = click.get_current_context(silent=True)
    name = "" if context is None else context.command.name or ""
    if context is None or not (name.startswith("mergekit-") or name == MERGE_COMMAND):
        return
    if context.params.get("quiet") or context.params.get("dry_run"):
        return
    runs = context.meta.setdefault(__name__, [])
    if not runs:
        context.with_resource(_summed_up_at_the_end(runs))
    runs.append(run)


def _listed(names: Sequence[str]) -> str:
    # In one order, whatever the order in which tensors were merged.
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


@contextmanager
def _summed_up_at_the_end(runs: Sequence[MergeRun]) -> Iterator[None]:
    # Not reached if the command fails: the error is then what there is to say.
    yield
    for run in runs:
        for line in run.lines():
            click.echo(line, err=True)
