"""The state of one merge: what it has merged and met so far, and the lines that sum it up."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import click
import numpy as np

from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.report.observation import Observation
from mergekit_karcher.sphere.results import Status

_LOG = logging.getLogger(__name__)

_NAMES_SHOWN = 5

# The methods whose merges are summed up.
KARCHER, FISHER = "karcher", "fisher"


class MergeRun:
    """One merge: made when it is planned, carried by its tasks, safe to use from any thread.

    Equal only to itself, so that the tasks that carry it are told apart by the merge they are of.

    Arguments:
        title: What the merge is called in its summary.
        method: `KARCHER` or `FISHER`.
        watched: Whether to keep what a report needs.
        names: For each output tensor that is to be merged, what each model that takes part calls
            it, by model.

    observations, means: What a report needs, by output tensor; means are over the inputs that have
    a weight.
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
        self.observations: dict[str, Observation] = {}
        self.means: dict[str, KarcherMean] = {}
        self._names = names or {}
        self._lock = threading.Lock()
        self._merged = 0
        self._largest_angle = 0.0
        self._flagged: dict[str, list[str]] = {
            "not certified unique": [],
            "fell back to the linear mean": [],
            "not converged": [],
        }
        self._incomplete: list[str] = []
        self._zero_metrics: list[str] = []
        self._tokens_without_base: dict[str, int] = {}
        self._warned_of_16_bits = False

    def label(self, name: str, model: str) -> str:
        """A model, and its name for an output tensor where slices make the two differ."""
        name_there = self._names.get(name, {}).get(model, name)
        return model if name_there == name else f"{model} (there {name_there})"

    def observe(self, observation: Observation) -> None:
        """Keep an observation for the report."""
        with self._lock:
            self.observations[observation.name] = observation

    def record(self, name: str, mean: KarcherMean | None, present: int) -> None:
        """Count a merged tensor.

        Arguments:
            name: The output tensor.
            mean: Its Karcher mean, if it has one.
            present: How many of the models that take part have the tensor.
        """
        with self._lock:
            self._merged += 1
            if present < len(self._names.get(name, ())):
                self._incomplete.append(name)
            if mean is None:
                return
            if self.watched:
                self.means[name] = mean
            if not np.isnan(mean.angles).all():
                self._largest_angle = max(self._largest_angle, float(np.nanmax(mean.angles)))
            if mean.status is Status.NOT_UNIQUE:
                self._flagged["fell back to the linear mean"].append(name)
            elif not mean.unique:
                self._flagged["not certified unique"].append(name)
            if mean.status is Status.NOT_CONVERGED:
                self._flagged["not converged"].append(name)

    def note_zero_metrics(self, name: str) -> None:
        """Remember a tensor whose metrics are zero in every model; warn of the first."""
        with self._lock:
            if not self._zero_metrics:
                _LOG.warning(
                    "The metrics of %s are zero in every model: it is merged as without any, "
                    "and so are others like it.",
                    name,
                )
            self._zero_metrics.append(name)

    def note_tokens_without_base(self, name: str, count: int) -> None:
        """Remember how many tokens of a tensor the base does not have."""
        with self._lock:
            self._tokens_without_base[name] = count

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

    def lines(self) -> Iterator[str]:
        """The summary, then at most one line of names for each thing to look at."""
        merged = f"{self.method} {self.title}: {self._merged} tensors merged"
        if self.method == FISHER:
            yield f"{merged}, each parameter weighed by the metrics of its models."
        else:
            counts = ", ".join(f"{len(names)} {what}" for what, names in self._flagged.items())
            degrees = math.degrees(self._largest_angle)
            yield f"{merged}, largest angle to the mean {degrees:.3g} degrees, {counts}."
        if self._zero_metrics:
            names = _listed(self._zero_metrics)
            yield f"  metrics zero in every model, merged as without any: {names}"
        for what, names_of_flag in self._flagged.items():
            if names_of_flag:
                yield f"  {what}: {_listed(names_of_flag)}"
        for name, count in self._tokens_without_base.items():
            yield f"  tokens that the base lacks, merged by the linear mean: {count} of {name}"
        if self._incomplete:
            names = _listed(self._incomplete)
            yield f"  missing from some models, merged from those that have them: {names}"


def announce(run: MergeRun) -> None:
    """Have the summary of a merge printed when one of mergekit's commands ends well.

    A line printed during the merge would land on the progress bar. Nothing is printed under
    --quiet, after a failure, or outside of those commands.
    """
    context = click.get_current_context(silent=True)
    if context is None or not (context.command.name or "").startswith("mergekit-"):
        return
    if context.params.get("quiet"):
        return
    runs = context.meta.setdefault(__name__, [])
    if not runs:
        context.with_resource(_summed_up_at_the_end(runs))
    runs.append(run)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


@contextmanager
def _summed_up_at_the_end(runs: Sequence[MergeRun]) -> Iterator[None]:
    # Not reached if the command fails: the error is then what there is to say.
    yield
    for run in runs:
        for line in run.lines():
            click.echo(line, err=True)
