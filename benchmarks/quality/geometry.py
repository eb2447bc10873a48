"""How the experts of a problem lie to each other and to their base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean, median
from typing import Any

import torch
from problem import Problem, State


def geometry(problem: Problem) -> dict[str, Any]:
    """Degrees between experts, by tensor and pair, and where there is a base, of task vectors.

    Task vectors are taken over the whole model. length_kept: of their mean over their mean length.
    """
    states = [expert.state for expert in problem.experts]
    angles = [
        math.degrees(math.acos(max(-1.0, min(1.0, _cosine(left[name], right[name])))))
        for left, right in combinations(states, 2)
        for name in left
    ]
    found: dict[str, Any] = {"angle_median": median(angles), "angle_largest": max(angles)}
    if problem.base is None:
        return found
    vectors = _task_vectors(problem.base, states)
    cosines = [_cosine(left, right) for left, right in combinations(vectors, 2)]
    kept = sum(vectors).norm() / sum(vector.norm() for vector in vectors)
    return found | {"task_cosine": fmean(cosines), "length_kept": float(kept)}


def effective_lambda(problem: Problem, merged: State) -> dict[str, float]:
    """The lambda of the task arithmetic that comes nearest to a merge; nothing without a base."""
    if problem.base is None:
        return {}
    states = [expert.state for expert in problem.experts]
    total = sum(_task_vectors(problem.base, states))
    (moved,) = _task_vectors(problem.base, [merged])
    return {"effective_lambda": float(moved @ total / (total @ total))}


def _task_vectors(base: State, states: Sequence[State]) -> list[torch.Tensor]:
    return [
        torch.cat([(state[name] - base[name]).double().flatten() for name in base])
        for state in states
    ]


def _cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    p, q = left.double().flatten(), right.double().flatten()
    return float(p @ q / (p.norm() * q.norm()))
