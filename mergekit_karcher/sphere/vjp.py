"""The derivative of the Karcher mean, in coefficients over its inputs and the upstream gradient.

Implicit differentiation of the equation tau = 0 that defines the mean direction x. With P the
projection orthogonal to x, theta_i the angle from x to the unit input p_i, and b_i = w_i
(1 - theta_i cot(theta_i)) / sin(theta_i)^2, the vector u solves

    (alpha I + L diag b) u = <P p_i, v>        v: the upstream gradient;  L_ij = <P p_i, P p_j>

and the magnitude M adds <v, x> dM/dW_i.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergekit_karcher.sphere.magnitude import Magnitude, magnitude_gradients, magnitude_ratios
from mergekit_karcher.sphere.results import SphereMeans, Status
from mergekit_karcher.sphere.trig import Floats, angle_terms, times
from mergekit_karcher.sphere.unit_vectors import normalised, unit_grams


def vjp(
    grams: Floats,
    weights: Floats,
    exponents: NDArray[np.int64],
    means: SphereMeans,
    magnitude: Magnitude,
) -> tuple[Floats, Floats]:
    """a (R, N) and B (R, N, N), with the gradients dW_i = a_i v + sum_j B_ij W_j of R means.

    All is as for `solve_means`, which returned means, but that the grams (R, N + 1, N + 1) and
    exponents have the upstream gradient v as the last vector. Gradients are zero for an input
    without direction and where the mean has no length, and those of the linear mean where it was
    returned as the fall-back.
    """
    shares = normalised(weights)
    rows, count = len(grams), len(shares)
    grams = grams.astype(np.float64)
    scaled_norms, unit = unit_grams(grams[:, :count, :count])
    directed = scaled_norms > 0
    lengths = np.where(directed, scaled_norms, 1)
    norms = np.where(directed, np.ldexp(lengths, exponents[:, :count]), 0)
    inner = np.ldexp(grams[:, :count, count] / lengths, exponents[:, count:])  # <p_i, v>
    per_norm = magnitude_ratios(magnitude, shares, norms, unit)

    ahead, among = np.zeros((rows, count)), np.zeros((rows, count, count))
    fallen_back = means.statuses == Status.NOT_UNIQUE
    ahead[fallen_back] = shares
    # Zeros have no such equation either: not a mean of zeros, nor one that a zero makes zero.
    solved = np.flatnonzero(~fallen_back & (per_norm > 0).any(-1))
    if solved.size:
        of_rows = (unit, norms, per_norm, inner, means.coefficients)
        values = (array[solved] for array in of_rows)
        ahead[solved], among[solved] = _implicit(magnitude, shares, *values)
    return ahead, among


def _implicit(
    magnitude: Magnitude,
    shares: Floats,
    unit: Floats,
    norms: Floats,
    per_norm: Floats,
    inner: Floats,
    coefficients: Floats,
) -> tuple[Floats, Floats]:
    """The same for means of length M > 0; per_norm: M / |W_i|, and inner: <p_i, v>, are (R, N)."""
    directed = norms > 0
    diagonal = np.arange(len(shares))
    weight = normalised(np.where(directed, shares, 0))
    length = (per_norm * norms).max(-1, keepdims=True)  # M
    usable = per_norm > 0
    c = np.where(usable, coefficients / np.where(usable, per_norm, 1), 0)
    cosines = times(unit, c)
    terms = angle_terms(np.clip(1 - cosines, 0, 2))
    alpha = (weight * terms.theta_cot).sum(-1)[:, None]
    bend = weight * terms.curvature
    matrix = (unit - cosines[:, :, None] * cosines[:, None, :]) * bend[:, None, :]
    matrix[:, diagonal, diagonal] += alpha
    along = (c * inner).sum(-1, keepdims=True)
    u = np.linalg.solve(matrix, (inner - along * cosines)[:, :, None])[:, :, 0]

    # z, the tangent vector that v becomes, as coefficients of v and of the unit inputs.
    z_upstream = length / alpha
    bent = bend * u
    z_among = z_upstream * (((bent * cosines).sum(-1)[:, None] - along) * c - bent)
    pull = weight * terms.theta_over_sin
    among = pull[:, :, None] * z_among[:, None, :] - length[:, :, None] * (
        bent[:, :, None] * c[:, None, :]
    )
    among[:, diagonal, diagonal] -= length * u * (pull - bend * cosines)
    among += along[:, :, None] * magnitude_gradients(magnitude, shares, norms, length)
    lengths = np.where(directed, norms, 1)
    both = directed[:, :, None] & directed[:, None, :]
    among = np.where(both, among / lengths[:, :, None] / lengths[:, None, :], 0)
    return np.where(directed, pull * z_upstream / lengths, 0), among
