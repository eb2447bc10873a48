"""Searching for the numbers of a merge, one at a time, on the windows to choose by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.optimize import minimize_scalar

from mergekit_karcher.compare.numbers import Number, with_value
from mergekit_karcher.compare.result import Tuned

# How often a merge is made and judged for one number, beside that of the value before.
TRIES = 8


# What a config costs on the windows to choose by; None once there is no time left.
Cost = Callable[[Mapping[str, Any]], float | None]


class _OutOfTime(Exception):
    """There is no time for another merge."""


def tune(
    config: Mapping[str, Any], numbers: Sequence[Number], cost: Cost
) -> tuple[dict[str, Any], list[Tuned], bool]:
    """Search for each number by itself, and keep what was best of it for the next.

    Brent's method in bounds, which takes no derivatives. Values have three digits, so that the
    config can be read.

    Arguments:
        config: Of mergekit.
        numbers: Of that config.
        cost: What a config costs.

    Returns:
        The config with the best values, those that are not what they were, and whether there was
        time for all numbers.
    """
    best, tuned = dict(config), []
    for number in numbers:
        value, evaluations, in_time = _least(best, number, cost)
        if value != number.before:
            best = with_value(best, number, value)
            tuned.append(
                Tuned(name=number.name, value=value, before=number.before, evaluations=evaluations)
            )
        if not in_time:
            return best, tuned, False
    return best, tuned, True


def _least(config: Mapping[str, Any], number: Number, cost: Cost) -> tuple[float, int, bool]:
    """The best value, how many were tried, and whether there was time for all."""
    tried: dict[float, float] = {}

    def at(position: float) -> float:
        value = _rounded(math.exp(position) if number.by_factors else position)
        if value not in tried:
            found = cost(with_value(config, number, value))
            if found is None:
                raise _OutOfTime
            tried[value] = found
        return tried[value]

    scale = math.log if number.by_factors else float
    low, high = scale(number.low), scale(number.high)
    try:
        at(scale(number.before))
        minimize_scalar(
            at,
            bounds=(low, high),
            method="bounded",
            options={"maxiter": TRIES, "xatol": (high - low) / 200},
        )
    except _OutOfTime:
        return min(tried, key=tried.__getitem__, default=number.before), len(tried), False
    return min(tried, key=tried.__getitem__), len(tried), True


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
