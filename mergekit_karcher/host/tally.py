"""What the tensors merged so far add up to: numbers and names that can be added to those of others.

A tally of one process can be stored, sent, and absorbed by that of another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.report.apart import Apart
from mergekit_karcher.report.observation import Observation
from mergekit_karcher.sphere.trig import Floats

MODELS, CHANGES = "models", "changes from the base"
UNPROVEN, FELL_BACK, UNFINISHED = (
    "not certified unique",
    "fell back to the linear mean",
    "not converged",
)


@dataclass
class Tally:
    """What some tensors of a merge come to.

    merged: how many there are. in_own_changes: how many of them are layers that were merged in the
    metrics of their changes from the base.
    apart: the angles between models, and between changes.
    flagged: for each thing to look at, of the tensor of a name, how many vectors out of how many.
    incomplete: tensors that some models lack. noted: tensors by what there is to say of them.
    tokens_without_base: how many tokens of a tensor the base lacks.
    lengths: of each model, the squared lengths of its change and of the base beside it, (2,).
    observations, means, shares: what a report needs, by output tensor; means and shares are over
    the inputs that have a weight.
    """

    merged: int = 0
    in_own_changes: int = 0
    apart: dict[str, Apart] = field(default_factory=lambda: {MODELS: Apart(), CHANGES: Apart()})
    flagged: dict[str, dict[str, tuple[int, int]]] = field(
        default_factory=lambda: {what: {} for what in (UNPROVEN, FELL_BACK, UNFINISHED)}
    )
    incomplete: list[str] = field(default_factory=list)
    noted: dict[str, list[str]] = field(default_factory=dict)
    tokens_without_base: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, Floats] = field(default_factory=dict)
    observations: dict[str, Observation] = field(default_factory=dict)
    means: dict[str, KarcherMean] = field(default_factory=dict)
    shares: dict[str, Floats] = field(default_factory=dict)

    def add_lengths(self, model: str, squared: Floats) -> None:
        """Add the squared lengths of a model's change and of the base beside it, (2,)."""
        self.lengths[model] = self.lengths.get(model, np.zeros(2)) + squared

    def absorb(self, other: Tally) -> None:
        """Add what other tensors of the same merge come to."""
        self.merged += other.merged
        self.in_own_changes += other.in_own_changes
        for what, apart in other.apart.items():
            self.apart[what].absorb(apart)
        for what, flagged in other.flagged.items():
            self.flagged[what].update(flagged)
        self.incomplete += other.incomplete
        for what, names in other.noted.items():
            self.noted.setdefault(what, []).extend(names)
        self.tokens_without_base.update(other.tokens_without_base)
        for model, squared in other.lengths.items():
            self.add_lengths(model, squared)
        self.observations.update(other.observations)
        self.means.update(other.means)
        self.shares.update(other.shares)
