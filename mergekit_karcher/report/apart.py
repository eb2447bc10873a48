"""How far models are apart: the one definition of sentences, tables, plots and closing lines.

Two models are as far apart as their tensors are: on average over all tensors, each counted by its
number of parameters, and at most in any one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from mergekit_karcher.report.schema import Tensor
from mergekit_karcher.sphere.trig import Floats


class Apart:
    """The angles between the models of a merge in radians, added up tensor by tensor."""

    def __init__(self) -> None:
        self._angles, self._sizes = 0.0, 0
        self.largest, self.where = 0.0, ""

    def add(self, name: str, size: int, angles: Iterable[float]) -> None:
        """Count the angles between every two models in one tensor of so many parameters."""
        for angle in angles:
            self._angles += size * angle
            self._sizes += size
            if not self.where or angle > self.largest:
                self.largest, self.where = angle, name

    def absorb(self, other: Apart) -> None:
        """Count what another one has counted."""
        self._angles += other._angles
        self._sizes += other._sizes
        if other.where and (not self.where or other.largest > self.largest):
            self.largest, self.where = other.largest, other.where

    @property
    def average(self) -> float | None:
        """Over all tensors and pairs of models; None where no two have a direction."""
        return self._angles / self._sizes if self._sizes else None

    @property
    def words(self) -> str:
        """Both numbers for a sentence; empty where no two models have a direction."""
        if self.average is None:
            return ""
        average, largest = (plain(math.degrees(angle)) for angle in (self.average, self.largest))
        if average == largest:
            return f"{average} degrees apart"
        return f"{average} degrees apart on average, {largest} at most (in {self.where})"


def apart(
    tensors: Iterable[Tensor], origin: str, base: int | None, without: Sequence[int] = ()
) -> Apart:
    """How far the models are apart in some tensors.

    base: the place of the base, which does not count where the mean is taken around it; without:
    the places of models that do not count either.
    """
    result = Apart()
    for tensor in tensors:
        view = tensor.view(origin)
        if view is not None:
            outside = base if tensor.origin == "base" else None
            result.add(tensor.name, tensor.size, view.pairs(outside, *without))
    return result


def average_by_pair(tensors: Iterable[Tensor], origin: str, count: int) -> Floats:
    """The average angle between every two of count models, (count, count); NaN where none is."""
    angles, sizes = np.zeros((count, count)), np.zeros((count, count))
    for tensor in tensors:
        view = tensor.view(origin)
        if view is not None:
            matrix = np.array(view.angles, dtype=float)
            angles += tensor.size * np.nan_to_num(matrix)
            sizes += tensor.size * np.isfinite(matrix)
    return np.where(sizes > 0, angles / np.maximum(sizes, 1), np.nan)


def average(values: Sequence[tuple[float | None, int]]) -> float | None:
    """The average of values, each counted by the size that comes with it; None where none is."""
    known = [(value, size) for value, size in values if value is not None]
    total = sum(size for _, size in known)
    return sum(value * size for value, size in known) / total if total else None


def plain(value: float) -> str:
    """A number of 0 or more for people: two or three digits, and never an exponent."""
    if value == 0:
        return "0"
    if value < 0.001:
        return "less than 0.001"
    digits = 3 if value >= 0.1 else 2
    return f"{value:.0f}" if value >= 100 else f"{value:.{digits}g}"


def plain_range(values: tuple[float, float]) -> str:
    """The smallest and the largest of some numbers; one number where they are the same."""
    low, high = (plain(value) for value in values)
    return low if low == high else f"{low} to {high}"
