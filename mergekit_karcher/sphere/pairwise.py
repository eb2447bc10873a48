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

from mergekit_karcher.sphere.descent import angles_to_point
from mergekit_karcher.sphere.trig import Floats


@dataclass(frozen=True, eq=False)
class PairwiseGeometry:
    """The lengths of N vectors W_i and the angles between them, as seen from one origin.

    norms: (N,) float64, |W_i|; NaN for a vector that is missing.
    chords: (N, N) float64, |p_i - p_j|^2 in [0, 4]; NaN where one of the two is zero or missing.
    """

    norms: Floats
    chords: Floats

    @property
    def angles(self) -> Floats:
        """Radians between the vectors, (N, N); NaN as the chords are."""
        angles: Floats = 2 * np.arctan2(np.sqrt(self.chords), np.sqrt(4 - self.chords))
        return angles

    @property
    def squared_differences(self) -> Floats:
        """|W_i - W_j|^2, (N, N)."""
        n = self.norms
        across = np.where((n[:, None] == 0) | (n == 0), 0, n[:, None] * n * self.chords)
        differences: Floats = across + (n[:, None] - n) ** 2
        return differences

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
        """How much of their length the vectors keep in their weighted linear mean.

        Arguments:
            shares: The weights w_i, (N,); those of missing vectors do not count.

        Returns:
            |sum w_i W_i| / sum w_i |W_i|, at most 1; NaN where all vectors with a weight are zero.
        """
        index = np.flatnonzero(self.norms > 0)
        parts = shares[index] * self.norms[index]
        total = parts.sum()
        if not total > 0:
            return float("nan")
        lost = parts @ self.chords[np.ix_(index, index)] @ parts / 2
        return float(np.sqrt(max(0.0, 1 - lost / total**2)))

    def angles_to(self, coefficients: Floats) -> Floats:
        """The angles from the vectors to a combination of them.

        Arguments:
            coefficients: The k_i, (N,); those of missing vectors do not count.

        Returns:
            Radians from each W_i to sum k_i W_i, (N,); NaN where one of the two is zero.
        """
        angles = np.full(len(self.norms), np.nan)
        index = np.flatnonzero(self.norms > 0)
        if index.size:
            some = self.take(index)
            angles[index] = angles_to_point(some.chords, coefficients[index] * some.norms)
        return angles

    def chord_between(self, first: Floats, second: Floats) -> float:
        """How far apart the directions of two combinations of the vectors are.

        Arguments:
            first, second: The a_i and b_i, (N,); those of missing vectors do not count.

        Returns:
            The distance of sum a_i W_i / |sum a_i W_i| from sum b_i W_i / |sum b_i W_i|, at most 2;
            NaN where one of the two is zero.
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
    """The geometry of vectors from their inner products.

    Arguments:
        gram: (N, N), <W_i, W_j> 2^-(e_i + e_j).
        exponents: The e_i, (N,).

    Returns:
        The vectors as seen from zero.
    """
    scaled = np.sqrt(np.maximum(np.diagonal(gram), 0))
    lengths = np.where(scaled > 0, scaled, np.nan)
    chords = np.clip(2 - 2 * gram / lengths[:, None] / lengths, 0, 4)
    np.fill_diagonal(chords, np.where(scaled > 0, 0, np.nan))
    return PairwiseGeometry(_double(np.ldexp(scaled, exponents)), _double(chords))


def geometry_of_differences(gram: Floats, exponents: NDArray[np.int64]) -> PairwiseGeometry:
    """The geometry of N vectors and their base from the inner products of differences.

    What is subtracted is as small as the differences are, so that close ones keep their angles.

    Arguments:
        gram: (N + 1, N + 1), scaled by exponents as for `geometry_of_gram`; the first N vectors
            are the differences W_i - B, the last is the base B itself.
        exponents: (N + 1,).

    Returns:
        W_1 .. W_N and B as seen from zero.
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
    return PairwiseGeometry(_double(norms), _double(_chords(apart, steps, norms)))


def as_seen_from(sphere: PairwiseGeometry, index: int) -> PairwiseGeometry:
    """The geometry of vectors as seen from one of them.

    Arguments:
        sphere: N vectors as seen from any origin.
        index: The one that becomes the origin.

    Returns:
        The N vectors; the one that is now the origin counts as missing.
    """
    squared = sphere.squared_differences
    norms = np.sqrt(squared[index])
    chords = _chords(squared, norms[:, None] - norms, norms)
    norms[index] = np.nan
    return PairwiseGeometry(norms, chords)


def joined(spheres: Sequence[PairwiseGeometry]) -> PairwiseGeometry:
    """The geometry of vectors that consist of parts, such as models of tensors.

    Arguments:
        spheres: The geometry of each part, all of N vectors.

    Returns:
        The whole vectors. A part that a vector misses adds nothing to it; the chord between two
        vectors counts the parts that neither of them misses.
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


def _double(values: Floats) -> Floats:
    """As float64: a report needs no more digits."""
    return values.astype(np.float64)
