"""Costs over windows as rates, their differences, and how sure these are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Vector = Sequence[float] | npt.NDArray[np.float64]


class Difference(NamedTuple):
    """How much larger one rate is than another, and the standard error of that."""

    value: float
    error: float


def rate(costs: Vector, sizes: Vector) -> float:
    """sum(costs) / sum(sizes): bits per byte, or the share of records in a wrong class."""
    return float(np.sum(costs) / np.sum(sizes))


def paired_difference(costs: Vector, others: Vector, sizes: Vector) -> Difference:
    """How much larger the rate of some costs is than that of others on the same n windows.

    With d = costs - others and s the sizes, value = sum(d) / sum(s), and by the delta method for a
    ratio error² = n / (n - 1) sum((d - value s)²) / sum(s)². For equal sizes that is the standard
    error of a mean.
    """
    d, s = np.subtract(costs, others), np.asarray(sizes, np.float64)
    value = float(d.sum() / s.sum())
    n = len(d)
    error = math.sqrt(n / (n - 1) * float(np.square(d - value * s).sum())) / float(s.sum())
    return Difference(value, error)


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """The mean of differences on texts that have nothing to do with each other."""
    count = len(differences)
    value = sum(difference.value for difference in differences) / count
    return Difference(value, math.hypot(*(one.error for one in differences)) / count)
