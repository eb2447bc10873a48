"""The geometry of N vectors as seen from an origin: their norms, and the chords between them.

Chords keep small angles where cosines do not.
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

from mergekit_karcher.sphere.descent import Spheres
from mergekit_karcher.sphere.trig import Floats


@dataclass(frozen=True, eq=False)
class PairwiseGeometry:
    """The lengths of N vectors W_i and the angles between them, seen from one origin; float64."""

    norms: Floats  # (N,), |W_i|; NaN for a vector that is missing
    chords: Floats  # (N, N), |p_i - p_j|^2 in [0, 4]; NaN where one is zero or missing

    @property
    def angles(self) -> Floats:
        """Radians between the vectors, (N, N); NaN as the chords are."""
        return 2 * np.arctan2(np.sqrt(self.chords), np.sqrt(4 - self.chords))

    def take(self, index: NDArray[np.intp]) -> PairwiseGeometry:
        """The geometry of some of the vectors, in the order of index."""
        return PairwiseGeometry(self.norms[index], self.chords[np.ix_(index, index)])

    def among(self, index: NDArray[np.intp], count: int) -> PairwiseGeometry:
        """The geometry of count vectors, of which these are at index and the others missing."""
        norms, chords = np.full(count, np.nan), np.full((count, count), np.nan)
        norms[index] = self.norms
        chords[np.ix_(index, index)] = self.chords
        return PairwiseGeometry(norms, chords)

    def linear_length(self, shares: Floats) -> float:
        """|sum w_i W_i| / sum w_i |W_i|, at most 1: what is left of the lengths in a linear mean.

        shares: the w_i, (N,); those of missing vectors do not count. NaN where all with a weight
        are zero.
        """
        index = np.flatnonzero(self.norms > 0)
        parts = shares[index] * self.norms[index]
        total = parts.sum()
        if not total > 0:
            return float("nan")
        lost = parts @ self.chords[np.ix_(index, index)] @ parts / 2
        return float(np.sqrt(max(0.0, 1 - lost / total**2)))

    def angles_to(self, coefficients: Floats) -> Floats:
        """Radians from each W_i to sum k_i W_i, (N,); NaN where one of the two is zero.

        coefficients: the k_i, (N,); those of missing vectors do not count.
        """
        angles = np.full(len(self.norms), np.nan)
        index = np.flatnonzero(self.norms > 0)
        some = self.take(index)
        sphere = Spheres(some.chords[None], np.ones((1, len(index))))
        angles[index] = sphere.angles_to((coefficients[index] * some.norms)[None])[0]
        return angles

    def chord_between(self, first: Floats, second: Floats) -> float:
        """The distance of sum a_i W_i / |sum a_i W_i| from sum b_i W_i / |sum b_i W_i|, at most 2.

        first, second: the a_i and b_i, (N,); those of missing vectors do not count. NaN where one
        of the two sums is zero.
        """
        some = self.take(np.flatnonzero(self.norms > 0))
        units = []
        for coefficients in (first, second):
            parts = coefficients[self.norms > 0] * some.norms
            squared = parts.sum() ** 2 - parts @ some.chords @ parts / 2
            if not squared > 0:
                return float("nan")
            units.append(parts / np.sqrt(squared))
        rest = units[0] - units[1]
        return float(np.sqrt(max(0.0, rest.sum() ** 2 - rest @ some.chords @ rest / 2)))


def geometry_of_gram(gram: Floats, exponents: NDArray[np.int64]) -> PairwiseGeometry:
    """N vectors as seen from zero, from gram_ij = <W_i, W_j> 2^-(e_i + e_j) and exponents e."""
    scaled = np.sqrt(np.maximum(np.diagonal(gram), 0))
    lengths = np.where(scaled > 0, scaled, np.nan)
    chords = np.clip(2 - 2 * gram / lengths[:, None] / lengths, 0, 4)
    np.fill_diagonal(chords, np.where(scaled > 0, 0, np.nan))
    return PairwiseGeometry(np.ldexp(scaled, exponents).astype(float), chords.astype(float))


def geometry_of_differences(gram: Floats, exponents: NDArray[np.int64]) -> PairwiseGeometry:
    """W_1 .. W_N and their base B as seen from zero, from a Gram matrix of W_i - B, and B the last.

    gram: (N + 1, N + 1), scaled as for `geometry_of_gram`. What is subtracted is as small as the
    differences are, so that close ones keep their angles.
    """
    scale = np.ldexp(np.ones(exponents.shape, np.longdouble), exponents)
    full = gram * scale[:, None] * scale
    inner, across, base = full[:-1, :-1], full[:-1, -1], full[-1, -1]
    squares = np.diagonal(inner)  # |W_i - B|^2
    norms = np.sqrt(np.maximum(np.append(squares + 2 * across + base, base), 0))
    apart = np.zeros(full.shape, np.longdouble)
    apart[:-1, :-1] = squares[:, None] + squares - 2 * inner
    apart[-1, :-1] = apart[:-1, -1] = squares
    rise = np.append(squares + 2 * across, 0)  # |W_i|^2 - |B|^2
    sums = norms[:, None] + norms
    steps = (rise[:, None] - rise) / np.where(sums > 0, sums, 1)
    return PairwiseGeometry(norms.astype(float), _chords(apart, steps, norms).astype(float))


def as_seen_from(sphere: PairwiseGeometry, index: int) -> PairwiseGeometry:
    """The same vectors as seen from the one at index, which then counts as missing."""
    n = sphere.norms
    across = np.where((n[:, None] == 0) | (n == 0), 0, n[:, None] * n * sphere.chords)
    squared = across + (n[:, None] - n) ** 2
    norms = np.sqrt(squared[index])
    chords = _chords(squared, norms[:, None] - norms, norms)
    norms[index] = np.nan
    return PairwiseGeometry(norms, chords)


def joined(spheres: Sequence[PairwiseGeometry]) -> PairwiseGeometry:
    """The geometry of N vectors that consist of parts, such as models of tensors.

    A part that a vector misses adds nothing to it; the chord between two vectors counts the parts
    that neither of them misses.
    """
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
    present = np.isfinite(norms).any(0)
    lengths = np.where(present, np.sqrt((np.nan_to_num(norms) ** 2).sum(0)), np.nan)
    np.fill_diagonal(chords, np.where(lengths > 0, 0, np.nan))
    return PairwiseGeometry(lengths, chords)


def _chords(squared: Floats, steps: Floats, norms: Floats) -> Floats:
    """From |W_i - W_j|^2 and |W_i| - |W_j|."""
    lengths = np.where(norms > 0, norms, np.nan)
    chords = np.clip((squared - steps**2) / lengths[:, None] / lengths, 0, 4)
    np.fill_diagonal(chords, np.where(norms > 0, 0, np.nan))
    return chords
