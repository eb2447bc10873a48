"""The weighted Karcher mean on the unit sphere, in coefficients over its N inputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergekit_karcher.sphere.descent import Points, Spheres
from mergekit_karcher.sphere.magnitude import Magnitude, magnitude_ratios
from mergekit_karcher.sphere.results import SphereMeans, Status
from mergekit_karcher.sphere.trig import Bools, Floats
from mergekit_karcher.sphere.uniqueness import in_open_hemisphere, linearly_independent, near_a_pole
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
    """The Karcher means of N inputs on R spheres; the linear ones where they may not be unique.

    The direction is the minimiser of sum_i w_i angle(x, W_i)^2 (paper, equation 9) over the inputs
    that have one; the magnitude counts zero inputs too. The weights (N,) > 0 have any sum; tol is
    the longest step, in radians, that may remain; max_iter counts the steps from each start.

    grams_rij = <W_ri, W_rj> 2^-(exponents_ri + exponents_rj), (R, N, N): exponents keep the squares
    of very large or small inputs representable. In long double, where the platform's is wider than
    float64, the coefficients keep float64's digits up to pi/2, where the mean amplifies errors of
    the Gram matrix by 1 / cos^2 of the angles.
    """
    shares = normalised(weights)
    scaled_norms, unit = unit_grams(grams)
    directed = scaled_norms > 0
    rows, count = scaled_norms.shape
    # Where no input has any length: the linear mean. Zeros in a metric may hold values that the
    # metric does not see.
    means = SphereMeans(
        np.full((rows, count), shares, np.float64),
        np.full((rows, count), np.nan),
        np.zeros(rows, np.int64),
        np.zeros(rows),
        np.ones(rows, bool),
        np.full(rows, Status.ZERO, dtype=object),
    )
    live = np.flatnonzero(directed.any(-1))
    if live.size == 0:
        return means
    directed, unit = directed[live], unit[live]
    norms = np.ldexp(scaled_norms[live], exponents[live])
    spheres = Spheres(2 - 2 * unit, normalised(np.where(directed, shares, 0)))
    points, steps, unique = _minimise(spheres, unit, directed, max_iter, tol)
    converged = unique & (points.residual <= points.smallest_residual(tol))
    angles, coefficients = points.theta, _unit_coefficients(spheres, points, converged)
    coefficients = coefficients * magnitude_ratios(magnitude, shares, norms, unit)
    lost = np.flatnonzero(~unique)
    if lost.size:
        coefficients[lost] = shares
        ratios = norms[lost] / norms[lost].max(-1, keepdims=True)
        linear = spheres.take(lost)
        angles[lost] = linear.angles_to(linear.weights * ratios)
    means.coefficients[live] = coefficients
    means.angles[live] = np.where(directed, angles, np.nan)
    means.iterations[live] = steps
    means.residuals[live] = np.where(unique, points.residual, np.nan)
    means.unique[live] = unique & (points.alpha > 0)
    means.statuses[live[converged]] = Status.CONVERGED
    means.statuses[live[unique & ~converged]] = Status.NOT_CONVERGED
    means.statuses[live[lost]] = Status.NOT_UNIQUE
    return means


def _minimise(
    spheres: Spheres, unit: Floats, directed: Bools, max_iter: int, tol: float
) -> tuple[Points, NDArray[np.int64], Bools]:
    """The lowest points that the descent reaches, the steps to them, and which have a certificate.

    On a sphere without one nothing is minimised. The descent starts from the linear mean.
    That is enough where the inputs are near it or independent; elsewhere it may lead to another
    minimum, and each input is tried as a start too.
    """
    best = spheres.points(spheres.weights)
    direct = best.valid & near_a_pole(best.versines, directed)
    direct[~direct] = linearly_independent(unit[~direct])
    in_hemisphere = direct.copy()
    in_hemisphere[~direct] = in_open_hemisphere(unit[~direct])

    steps = np.zeros(len(unit), np.int64)
    index = np.flatnonzero(in_hemisphere & best.valid)
    points = best.take(index)
    steps[index] = spheres.take(index).descend(points, max_iter, tol)
    best.put(index, points)
    again = np.flatnonzero(in_hemisphere & ~(direct & best.valid & (best.alpha > 0)))
    for start in range(unit.shape[-1]) if again.size else ():
        index = again[directed[again, start]]
        at_input = np.tile(np.eye(unit.shape[-1])[start], (len(index), 1))
        some = spheres.take(index)
        points = some.points(at_input)
        taken = some.descend(points, max_iter, tol)
        better = ~best.valid[index] | (points.objective < best.objective[index])
        best.put(index[better], points.take(better))
        steps[index[better]] = taken[better]
    return best, steps, in_hemisphere


def _unit_coefficients(spheres: Spheres, points: Points, converged: Bools) -> Floats:
    """The means as coefficients over the unit inputs, (R, N)."""
    # At the mean itself tau = 0 gives the coefficients again, and well defined ones where
    # dependent inputs leave c open.
    closed = converged & (points.alpha > 0)
    alpha = np.where(closed, points.alpha, 1)[:, None]
    from_angles = spheres.weights * points.theta_over_sin / alpha
    return np.where(closed[:, None], from_angles, points.coefficients)
