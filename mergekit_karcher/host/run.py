"""What a merge met, told in a few lines when the command ends."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import click
import numpy as np

from mergekit_karcher.means.karcher import Group
from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.report.observation import Observation
from mergekit_karcher.sphere.solver import Status

_LOG = logging.getLogger(__name__)

_NAMES_SHOWN = 5

# The methods whose merges are summed up.
KARCHER, FISHER = "karcher", "fisher"


class Stage:
    """The tensors that one planned merge has produced so far; safe to record from any thread.

    watched: whether to keep what a report needs, observations and means (over the inputs that have
    a weight), by output tensor. method: the name of the merge method.
    """

    def __init__(self, title: str, watched: bool, method: str) -> None:
        self.title, self.method = title, method
        self.watched = watched
        self.observations: dict[str, Observation] = {}
        self.means: dict[str, KarcherMean] = {}
        # For each output tensor still to come, the models that take part, and what they call it.
        self.inputs: dict[str, dict[str, str]] = {}
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

    def observe(self, observation: Observation) -> None:
        with self._lock:
            self.observations[observation.name] = observation

    def note_zero_metrics(self, name: str) -> None:
        with self._lock:
            if name in self.inputs:
                if not self._zero_metrics:
                    _LOG.warning(
                        "The metrics of %s are zero in every model: it is merged as without any, "
                        "and so are others like it.",
                        name,
                    )
                self._zero_metrics.append(name)

    def record(self, name: str, mean: KarcherMean | None, present: int) -> None:
        """Count a tensor, with its Karcher mean if it has one."""
        with self._lock:
            inputs = self.inputs.pop(name, None)
            if inputs is None:  # of another merge, not of this plan
                return
            self._merged += 1
            if present < len(inputs):
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

    def lines(self) -> Iterator[str]:
        """The summary, then at most one line of names for each thing to look at."""
        found = f"{self.method} {self.title}: {self._merged} tensors merged"
        if self.method == FISHER:
            yield f"{found}, each parameter weighed by the metrics of its models."
        else:
            counts = ", ".join(f"{len(names)} {what}" for what, names in self._flagged.items())
            degrees = math.degrees(self._largest_angle)
            yield f"{found}, largest angle to the mean {degrees:.3g} degrees, {counts}."
        if self._zero_metrics:
            yield (
                f"  metrics zero in every model, merged as without any: "
                f"{_listed(self._zero_metrics)}"
            )
        for what, names in self._flagged.items():
            if names:
                yield f"  {what}: {_listed(names)}"
        if self._incomplete:
            yield (
                f"  missing from some models, merged from those that have them: "
                f"{_listed(self._incomplete)}"
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


_current: Stage | None = None
# The merge that was warned last; this value is of none.
_warned_of: object = _LOG


def begin(title: str, *, watched: bool = False, method: str = KARCHER) -> Stage:
    """Start the summary of a merge that has been planned; later records belong to it.

    Inside one of mergekit's own commands it is printed when the command ends well, unless it was
    told to be quiet. A line printed during the merge would land on the progress bar.
    """
    global _current
    _current = Stage(title, watched, method)
    context = click.get_current_context(silent=True)
    mergekits = context is not None and (context.command.name or "").startswith("mergekit-")
    if context is not None and mergekits and not context.params.get("quiet"):
        stages = context.meta.setdefault(__name__, [])
        if not stages:
            context.with_resource(_told_at_the_end(stages))
        stages.append(_current)
    return _current


def label(name: str, model: str) -> str:
    """The model, and its own name for that output tensor where slices make them differ."""
    inputs = _current.inputs if _current is not None else {}
    own = inputs.get(name, {}).get(model, name)
    return model if own == name else f"{model} (there {own})"


def is_watched(name: str) -> bool:
    """Whether a report is to be written on the merge that this output tensor belongs to."""
    return _current is not None and _current.watched and name in _current.inputs


def observe(observation: Observation) -> None:
    """Keep an observation for that report."""
    if _current is not None:
        _current.observe(observation)


def record(group: Group, mean: KarcherMean | None) -> None:
    """Count one merged tensor, if a planned merge is under way."""
    if _current is not None:
        present = len(group.tensors) + (group.base is not None)
        _current.record(group.name, mean, present)


def note_zero_metrics(name: str) -> None:
    """Remember a tensor whose metrics are zero in every model."""
    if _current is not None:
        _current.note_zero_metrics(name)


def warn_of_16_bits(name: str, dtypes: Iterable[str]) -> None:
    """Say once a merge that differences of what arrives in 16 bits are mostly rounding."""
    global _warned_of
    narrow = sorted(dtype for dtype in dtypes if dtype in ("torch.float16", "torch.bfloat16"))
    if not narrow or _warned_of is _current:
        return
    _warned_of = _current
    _LOG.warning(
        "origin: base takes differences of tensors that arrive as %s (%s is the first): those of "
        "close fine-tunes are then mostly rounding. If the files hold more, use dtype: float32 "
        "with out_dtype: bfloat16.",
        narrow[0].removeprefix("torch."),
        name,
    )


@contextmanager
def _told_at_the_end(stages: Sequence[Stage]) -> Iterator[None]:
    # Not reached if the command fails: the error is then what there is to say.
    yield
    for stage in stages:
        for line in stage.lines():
            click.echo(line, err=True)
