"""The derivative of the Karcher mean, in coefficients over its inputs and the upstream gradient."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergekit_karcher.sphere.solver import (
    Magnitude,
    SphereMeans,
    Status,
    magnitude_ratios,
    normalised,
    unit_grams,
)
from mergekit_karcher.sphere.trig import Floats, angle_terms, times


def vjp(
    grams: Floats,
    weights: Floats,
    exponents: NDArray[np.int64],
    means: SphereMeans,
    magnitude: Magnitude,
) -> tuple[Floats, Floats]:
    """Coefficients of the vector-Jacobian products of R means.

    grams: (R, N + 1, N + 1), inner products of W_1 .. W_N and the upstream gradient v, scaled by
        exponents (R, N + 1) as in `solve_means`.
    weights: (N,), as given there. means: what it returned. magnitude: as given there.

    Returns a (R, N) and B (R, N, N) with dW_i = a_i v + sum_j B_ij W_j. Implicit differentiation
    of tau = 0; with P the projection orthogonal to the mean direction x, u solves
    (alpha I + L diag b) u = <P p_i, v>, and the magnitude M adds <v, x> dM/dW_i. An input without
    direction or without weight has gradient zero, the fall-back that of the linear mean.
    """
    shares = normalised(weights)
    count = len(shares)
    grams = grams.astype(np.float64)
    scaled_norms, unit = unit_grams(grams[:, :count, :count])
    directed = scaled_norms > 0
    norms = np.ldexp(np.where(directed, scaled_norms, 1), exponents[:, :count])
    present = directed.any(-1, keepdims=True)
    weight = normalised(np.where(directed | ~present, shares, 0))
    upstream = grams[:, :count, count] / np.where(directed, scaled_norms, 1)
    inner = np.ldexp(upstream, exponents[:, count:])  # <p_i, v>

    per_norm = magnitude_ratios(magnitude, shares, np.where(directed, norms, 0), unit)
    length = (per_norm * norms).max(-1, keepdims=True)  # M
    usable = directed & (per_norm > 0)
    c = np.where(usable, means.coefficients / np.where(usable, per_norm, 1), 0)
    cosines = times(unit, c)
    terms = angle_terms(np.clip(1 - cosines, 0, 2))
    alpha = (weight * terms.cotangent).sum(-1)[:, None]
    bend = weight * terms.curvature
    matrix = (unit - cosines[:, :, None] * cosines[:, None, :]) * bend[:, None, :]
    diagonal = np.arange(count)
    matrix[:, diagonal, diagonal] += alpha
    along = (c * inner).sum(-1, keepdims=True)
    # Fall-backs and zeros have no such equation.
    matrix[[s in (Status.NOT_UNIQUE, Status.ZERO) for s in means.statuses]] = np.eye(count)
    u = np.linalg.solve(matrix, (inner - along * cosines)[:, :, None])[:, :, 0]

    # z, the tangent vector that v becomes, as coefficients of v and of the unit inputs.
    z_upstream = length / alpha
    bent = bend * u
    z_among = z_upstream * (((bent * cosines).sum(-1)[:, None] - along) * c - bent)
    stretch = weight * terms.stretch
    among = stretch[:, :, None] * z_among[:, None, :] - length[:, :, None] * (
        bent[:, :, None] * c[:, None, :]
    )
    among[:, diagonal, diagonal] -= length * u * (stretch - bend * cosines)
    among += along[:, :, None] * _of_length(magnitude, shares, norms, unit, length)
    both = directed[:, :, None] & directed[:, None, :]
    among = np.where(both, among / norms[:, :, None] / norms[:, None, :], 0)
    ahead = np.where(directed, stretch * z_upstream / norms, 0)
    for row in np.flatnonzero([s is Status.NOT_UNIQUE for s in means.statuses]):
        ahead[row], among[row] = shares, 0
    return ahead, among


def _of_length(
    magnitude: Magnitude, shares: Floats, norms: Floats, unit: Floats, length: Floats
) -> Floats:
    """n_i dM/dW_i as coefficients (R, N, N) over the unit inputs."""
    if magnitude is Magnitude.LINEAR:
        parts = shares * norms
        safe = np.where(length > 0, length, 1)[:, :, None]
        return parts[:, :, None] * (parts[:, None, :] / safe)
    diagonal = np.eye(len(shares))
    scale = length * shares if magnitude is Magnitude.GEOMETRIC else norms * shares
    along: Floats = scale[:, :, None] * diagonal
    return along
