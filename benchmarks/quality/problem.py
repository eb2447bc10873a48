"""What a problem is: experts to merge, the base that they came from, and how to judge a merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, torch.Tensor]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Expert:
    """Float32 weights that were trained on one task."""

    task: str
    state: State


@dataclass(frozen=True)
class Data:
    """What an expert's training data says of its weights, of a number of windows of it.

    A window is one of a text, as long as those of training, or 64 images. More windows contain the
    fewer. grams: the input Grams of its linear layers, by the names of their weights. fisher: the
    diagonal Fisher information of all weights, a window of a text or an image at a time. tokens:
    those of the windows themselves.
    """

    grams: Callable[[Expert, int], State]
    fisher: Callable[[Expert, int], State] | None = None
    tokens: Callable[[Expert, int], torch.Tensor] | None = None


@dataclass(frozen=True)
class Problem:
    """One set at one seed and size; base is None where the experts have none in common."""

    section: str
    case: Mapping[str, Any]
    base: State | None
    experts: Sequence[Expert]
    judge: Callable[[State, str], Metrics]
    data: Data | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks of the experts, each once."""
        return list(dict.fromkeys(expert.task for expert in self.experts))

    def evaluate(self, state: State) -> dict[str, Metrics]:
        """Metrics of one model on the held-out data of every task."""
        return {task: self.judge(state, task) for task in self.tasks}

    def evaluate_experts(self) -> dict[str, Metrics]:
        """For every task the mean metrics of the experts trained on it."""
        return {
            task: mean([self.judge(e.state, task) for e in self.experts if e.task == task])
            for task in self.tasks
        }


def mean(found: Sequence[Metrics]) -> Metrics:
    """The mean of each metric."""
    return {key: sum(metrics[key] for metrics in found) / len(found) for key in found[0]}
