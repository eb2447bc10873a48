"""The weighted Karcher mean on the unit sphere, in coefficients over its N inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergekit_karcher.sphere.descent import Points, Spheres
from mergekit_karcher.sphere.magnitude import Magnitude, magnitude_ratios
from mergekit_karcher.sphere.results import SphereMeans, Status
from mergekit_karcher.sphere.trig import Bools, Floats
from mergekit_karcher.sphere.uniqueness import (
    in_open_hemisphere,
    linearly_independent,
    near_a_pole,
)
from mergekit_karcher.sphere.unit_vectors import normalised, unit_grams


def solve_means(
    grams: Floats,
    weights: Floats,
    exponents: NDArray[np.int64],
    *,
    magnitude: Magnitude,
    max_iter: int,
    tol: float,
) -> SphereMeans:
    """The Karcher means of N inputs on each of R spheres, from their inner products.

    The direction is the minimiser of sum_i w_i angle(x, W_i)^2 (paper, equation 9) over the inputs
    that have one; the magnitude counts zero inputs too.

    Arguments:
        grams: (R, N, N), grams_rij = <W_ri, W_rj> 2^-(exponents_ri + exponents_rj). In long double,
            where the platform's is wider than float64, the coefficients keep float64's digits up
            to pi/2, where the mean amplifies errors of the Gram matrix by 1 / cos^2 of the angles.
        weights: (N,) positive and finite, of any sum.
        exponents: (R, N) integers that keep the squares of very large or small inputs
            representable.
        magnitude: The length of the means.
        max_iter: The most steps from each start.
        tol: Radians, the longest step that may remain.

    Returns:
        The means. Where they are not certainly unique, the weighted linear mean.
    """
    shares = normalised(weights)
    scaled_norms, unit = unit_grams(grams)
    directed = scaled_norms > 0
    means = _means_of_zeros(shares, len(grams))
    live = np.flatnonzero(directed.any(-1))
    if live.size == 0:
        return means
    directed, unit = directed[live], unit[live]
    norms = np.ldexp(scaled_norms[live], exponents[live])
    spheres = Spheres(2 - 2 * unit, normalised(np.where(directed, shares, 0)))
    best = _minimise(spheres, unit, directed, max_iter, tol)

    points, unique = best.points, best.in_hemisphere
    converged = unique & (points.residual <= points.smallest_residual(tol))
    angles = points.theta
    coefficients = _unit_coefficients(spheres, points, converged)
    coefficients = coefficients * magnitude_ratios(magnitude, shares, norms, unit)
    lost = np.flatnonzero(~unique)
    if lost.size:
        coefficients[lost] = shares
        angles[lost] = _angles_to_linear_mean(spheres.take(lost), norms[lost])
    means.coefficients[live] = coefficients
    means.angles[live] = np.where(directed, angles, np.nan)
    means.iterations[live] = best.steps
    means.residuals[live] = np.where(unique, points.residual, np.nan)
    means.unique[live] = unique & (points.alpha > 0)
    means.statuses[live[converged]] = Status.CONVERGED
    means.statuses[live[unique & ~converged]] = Status.NOT_CONVERGED
    means.statuses[live[lost]] = Status.NOT_UNIQUE
    return means


def _means_of_zeros(shares: Floats, rows: int) -> SphereMeans:
    """The linear means of inputs without any length, on that many spheres."""
    means = SphereMeans(
        np.empty((rows, len(shares))),
        np.full((rows, len(shares)), np.nan),
        np.zeros(rows, np.int64),
        np.zeros(rows),
        np.ones(rows, bool),
        np.full(rows, Status.ZERO, dtype=object),
    )
    # Zeros in a metric may hold values that the metric does not see.
    means.coefficients[:] = shares
    return means


@dataclass(frozen=True, eq=False)
class _Minima:
    """Where the descent ended on each sphere, and whether it was right to begin."""

    points: Points
    steps: NDArray[np.int64]  # (R,)
    in_hemisphere: Bools  # (R,) where not, nothing was minimised


def _minimise(
    spheres: Spheres, unit: Floats, directed: Bools, max_iter: int, tol: float
) -> _Minima:
    """The lowest points that the descent reaches on the spheres with a certificate.

    It starts from the linear mean. That is enough where the inputs are near it or independent;
    elsewhere it may lead to another minimum, and each input is tried as a start too.
    """
    best = spheres.points(spheres.weights)
    direct = best.valid & near_a_pole(best.versines, directed)
    doubtful = np.flatnonzero(~direct)
    if doubtful.size:
        direct[doubtful] = linearly_independent(unit[doubtful])
    in_hemisphere = direct.copy()
    doubtful = np.flatnonzero(~direct)
    if doubtful.size:
        in_hemisphere[doubtful] = in_open_hemisphere(unit[doubtful])

    steps = np.zeros(len(unit), np.int64)
    index = np.flatnonzero(in_hemisphere & best.valid)
    points, taken = spheres.take(index).descend(best.take(index), max_iter, tol)
    best.put(index, points)
    steps[index] = taken
    again = np.flatnonzero(in_hemisphere & ~(direct & best.valid & (best.alpha > 0)))
    for start in range(unit.shape[-1]) if again.size else ():
        index = again[directed[again, start]]
        at_input = np.tile(np.eye(unit.shape[-1])[start], (len(index), 1))
        some = spheres.take(index)
        points, taken = some.descend(some.points(at_input), max_iter, tol)
        better = ~best.valid[index] | (points.objective < best.objective[index])
        best.put(index[better], points.take(better))
        steps[index[better]] = taken[better]
    return _Minima(best, steps, in_hemisphere)


def _unit_coefficients(spheres: Spheres, points: Points, converged: Bools) -> Floats:
    """The means as coefficients over the unit inputs, (R, N)."""
    # At the mean itself tau = 0 gives the coefficients again, and well defined ones where
    # dependent inputs leave c open.
    closed = converged & (points.alpha > 0)
    alpha = np.where(closed, points.alpha, 1)[:, None]
    from_angles = spheres.weights * points.theta_over_sin / alpha
    coefficients: Floats = np.where(closed[:, None], from_angles, points.coefficients)
    return coefficients


def _angles_to_linear_mean(spheres: Spheres, norms: Floats) -> Floats:
    """Radians from the inputs to their weighted linear mean, (R, N); NaN where that is zero."""
    ratios = norms / norms.max(-1, keepdims=True)
    points = spheres.points(spheres.weights * ratios)
    return np.where(points.valid[:, None], points.theta, np.nan)
