"""How the experts of a problem lie to each other and to their base."""

from __future__ import annotations

import math
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
    # One tensor of each model in memory: ten of SmolLM2 are too large to be kept in float64.
    products = torch.zeros(len(states), len(states), dtype=torch.float64)
    for name, origin in problem.base.items():
        vectors = torch.stack([(state[name] - origin).flatten() for state in states]).double()
        products += vectors @ vectors.T
    lengths = products.diagonal().sqrt()
    cosines = products / lengths / lengths[:, None]
    return found | {
        "task_cosine": fmean(cosines[pair].item() for pair in combinations(range(len(states)), 2)),
        "length_kept": float(products.sum().sqrt() / lengths.sum()),
    }


def effective_lambda(problem: Problem, merged: State) -> dict[str, float]:
    """The lambda of the task arithmetic that comes nearest to a merge; nothing without a base."""
    if problem.base is None:
        return {}
    along = length = 0.0
    for name, origin in problem.base.items():
        changes = [(expert.state[name] - origin).double().flatten() for expert in problem.experts]
        total = torch.as_tensor(sum(changes))
        along += float((merged[name] - origin).double().flatten() @ total)
        length += float(total @ total)
    return {"effective_lambda": along / length}


def _cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    p, q = left.double().flatten(), right.double().flatten()
    return float(p @ q / (p.norm() * q.norm()))
