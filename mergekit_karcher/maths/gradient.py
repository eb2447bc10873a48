"""The derivative of the Karcher mean, in coefficients over its inputs and the upstream gradient."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergekit_karcher.maths.geometry import Floats, angle_terms
from mergekit_karcher.maths.mean import KarcherMean, Status, normalised, unit_gram


def pull_back(
    gram: Floats, weights: Floats, exponents: NDArray[np.int64], mean: KarcherMean
) -> tuple[Floats, Floats]:
    """Coefficients of the vector-Jacobian product of the mean.

    gram: (N + 1, N + 1), inner products of W_1 .. W_N and the upstream gradient v, scaled by
        exponents (N + 1,) as in `mean_of_gram`.
    weights: (N,), as given there. mean: what it returned.

    Returns a (N,) and B (N, N) with dW_i = a_i v + sum_j B_ij W_j. Implicit differentiation of
    tau = 0; with P the projection orthogonal to the mean direction x, u solves
    (alpha I + L diag b) u = <P p_i, v>, and the magnitude adds <v, x> w_i p_i. An input without
    direction or without weight has gradient zero, the fall-back that of the linear mean.
    """
    shares = normalised(weights)
    count = len(shares)
    upstream = np.zeros(count)
    among = np.zeros((count, count))
    if mean.status is Status.NOT_UNIQUE:
        return shares, among
    directed = np.flatnonzero(np.diagonal(gram)[:count] > 0)
    if directed.size == 0:
        return upstream, among

    gram = gram.astype(np.float64)
    scaled_norms, unit = unit_gram(gram[np.ix_(directed, directed)])
    norms = np.ldexp(scaled_norms, exponents[directed])
    share = shares[directed]
    magnitude = share @ norms
    weight = normalised(share)
    inner = np.ldexp(gram[directed, count] / scaled_norms, exponents[count])  # <p_i, v>

    c = mean.coefficients[directed] * norms / magnitude
    cosines = np.cos(mean.angles[directed])
    terms = angle_terms(np.clip(1 - cosines, 0, 2))
    alpha = weight @ terms.cotangent
    bend = weight * terms.curvature
    products = unit - np.outer(cosines, cosines)
    along = c @ inner
    u = np.linalg.solve(alpha * np.eye(len(bend)) + products * bend, inner - along * cosines)

    # z, the tangent vector that v becomes, as coefficients of v and of the unit inputs.
    z_upstream = magnitude / alpha
    z_among = z_upstream * ((bend * u) @ cosines * c - along * c - bend * u)
    stretch = weight * terms.stretch
    direction = np.outer(stretch, z_among) - magnitude * np.outer(bend * u, c)
    along_input = magnitude * u * (stretch - bend * cosines)
    direction[np.diag_indices(len(directed))] -= along_input

    upstream[directed] = stretch * z_upstream / norms
    per_input = direction / norms[:, None] + np.diag(along * share)
    among[np.ix_(directed, directed)] = per_input / norms
    return upstream, among
