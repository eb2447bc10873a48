"""N vectors as seen from an origin: norms and chords, which keep small angles where cosines do not.

With the unit vectors p_i = W_i / |W_i| and c_ij = |p_i - p_j|^2, everything that a Gram matrix says
can be said without cancellation:

    angle_ij          = 2 atan2(sqrt(c_ij), sqrt(4 - c_ij))
    |W_i - W_j|^2     = |W_i| |W_j| c_ij + (|W_i| - |W_j|)^2
    |sum a_i p_i|^2   = (sum a)^2 - a'ca / 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergekit_karcher.sphere.descent import angles_to_point
from mergekit_karcher.sphere.trig import Floats


@dataclass(frozen=True, eq=False)
class PairwiseGeometry:
    """N vectors W_i as seen from one origin.

    norms: (N,), NaN for a vector that is not there.
    chords: (N, N), |p_i - p_j|^2 in [0, 4], NaN where one of the two has no direction.
    """

    norms: Floats
    chords: Floats

    @property
    def angles(self) -> Floats:
        """Radians between the vectors, (N, N)."""
        angles: Floats = 2 * np.arctan2(np.sqrt(self.chords), np.sqrt(4 - self.chords))
        return angles

    @property
    def squared_differences(self) -> Floats:
        """|W_i - W_j|^2, (N, N); a vector without direction is at zero."""
        n = self.norms
        across = np.where((n[:, None] == 0) | (n == 0), 0, n[:, None] * n * self.chords)
        differences: Floats = across + (n[:, None] - n) ** 2
        return differences

    def take(self, index: NDArray[np.intp]) -> PairwiseGeometry:
        """Some of the vectors."""
        return PairwiseGeometry(self.norms[index], self.chords[np.ix_(index, index)])

    def among(self, index: NDArray[np.intp], count: int) -> PairwiseGeometry:
        """The vectors at those places among count, the others of which are not there."""
        norms, chords = np.full(count, np.nan), np.full((count, count), np.nan)
        norms[index] = self.norms
        chords[np.ix_(index, index)] = self.chords
        return PairwiseGeometry(norms, chords)

    def linear_length(self, shares: Floats) -> float:
        """|sum w_i W_i| / sum w_i |W_i| over the vectors that are there; NaN where all are zero."""
        index = np.flatnonzero(self.norms > 0)
        parts = shares[index] * self.norms[index]
        total = parts.sum()
        if not total > 0:
            return float("nan")
        lost = parts @ self.chords[np.ix_(index, index)] @ parts / 2
        return float(np.sqrt(max(0.0, 1 - lost / total**2)))

    def angles_to(self, coefficients: Floats) -> Floats:
        """Radians from each vector to sum k_i W_i, (N,); NaN without a direction."""
        directed = self.norms > 0
        angles = np.full(len(self.norms), np.nan)
        index = np.flatnonzero(directed)
        if index.size:
            some = self.take(index)
            angles[index] = angles_to_point(some.chords, coefficients[index] * some.norms)
        return angles

    def gap(self, first: Floats, second: Floats) -> float:
        """The chord between the directions of sum a_i W_i and of sum b_i W_i, at most 2."""
        index = np.flatnonzero(self.norms > 0)
        some = self.take(index)
        units = []
        for coefficients in (first, second):
            parts = coefficients[index] * some.norms
            squared = parts.sum() ** 2 - parts @ some.chords @ parts / 2
            if not squared > 0:
                return float("nan")
            units.append(parts / np.sqrt(squared))
        rest = units[0] - units[1]
        return float(np.sqrt(max(0.0, rest.sum() ** 2 - rest @ some.chords @ rest / 2)))


def geometry_of_gram(gram: Floats, exponents: NDArray[np.int64]) -> PairwiseGeometry:
    """From inner products (N, N), scaled by 2^-(e_i + e_j), of vectors seen from zero."""
    scaled = np.sqrt(np.maximum(np.diagonal(gram), 0))
    lengths = np.where(scaled > 0, scaled, np.nan)
    chords = np.clip(2 - 2 * gram / lengths[:, None] / lengths, 0, 4)
    np.fill_diagonal(chords, np.where(scaled > 0, 0, np.nan))
    return PairwiseGeometry(_double(np.ldexp(scaled, exponents)), _double(chords))


def geometry_of_differences(gram: Floats, exponents: NDArray[np.int64]) -> PairwiseGeometry:
    """The vectors seen from zero, from inner products of differences (N + 1, N + 1).

    The first N are those of W_i - B, the last is B itself; so are those of the result W_i and B.
    What is subtracted is as small as the differences are, so that close ones keep their angles.
    """
    scale = np.ldexp(np.ones(exponents.shape, np.longdouble), exponents)
    full = gram * scale[:, None] * scale
    inner, across, base = full[:-1, :-1], full[:-1, -1], full[-1, -1]
    squares = np.diagonal(inner)
    norms = np.sqrt(np.maximum(np.append(squares + 2 * across + base, base), 0))
    apart = np.zeros(full.shape, np.longdouble)
    apart[:-1, :-1] = squares[:, None] + squares - 2 * inner
    apart[-1, :-1] = apart[:-1, -1] = squares
    rise = np.append(squares + 2 * across, 0)  # |W_i|^2 - |B|^2
    sums = norms[:, None] + norms
    steps = (rise[:, None] - rise) / np.where(sums > 0, sums, 1)
    return PairwiseGeometry(_double(norms), _double(_chords(apart, steps, norms)))


def as_seen_from(sphere: PairwiseGeometry, index: int) -> PairwiseGeometry:
    """The vectors as seen from one of them, which itself is not there any more (NaN)."""
    squared = sphere.squared_differences
    norms = np.sqrt(squared[index])
    chords = _chords(squared, norms[:, None] - norms, norms)
    norms[index] = np.nan
    return PairwiseGeometry(norms, chords)


def joined(spheres: Sequence[PairwiseGeometry]) -> PairwiseGeometry:
    """Vectors that consist of those parts; a pair counts the parts that both of it have."""
    norms = np.array([sphere.norms for sphere in spheres])
    parts = np.array([np.nan_to_num(sphere.chords) for sphere in spheres])
    both = np.isfinite(norms[:, :, None]) & np.isfinite(norms[:, None, :])
    first = np.where(both, np.nan_to_num(norms)[:, :, None], 0)
    totals = np.sqrt((first**2).sum(0))
    shares = first / np.where(totals > 0, totals, 1)
    others = shares.transpose(0, 2, 1)
    # |sum a p - sum b q|^2 over orthogonal parts, a and b of length one: no digit is lost.
    chords = (shares * others * parts + (shares - others) ** 2).sum(0)
    chords = np.where((totals > 0) & (totals.T > 0), np.clip(chords, 0, 4), np.nan)
    there = np.isfinite(norms).any(0)
    lengths = np.where(there, np.sqrt((np.nan_to_num(norms) ** 2).sum(0)), np.nan)
    np.fill_diagonal(chords, np.where(lengths > 0, 0, np.nan))
    return PairwiseGeometry(lengths, chords)


def _chords(squared: Floats, steps: Floats, norms: Floats) -> Floats:
    """From |W_i - W_j|^2 and |W_i| - |W_j|."""
    lengths = np.where(norms > 0, norms, np.nan)
    chords = np.clip((squared - steps**2) / lengths[:, None] / lengths, 0, 4)
    np.fill_diagonal(chords, np.where(norms > 0, 0, np.nan))
    return chords


def _double(values: Floats) -> Floats:
    """As float64: what is told of the vectors needs no more."""
    return values.astype(np.float64)
