"""Inputs of any length and weight as unit vectors, with weights that sum to one."""

from __future__ import annotations

import numpy as np

from mergekit_karcher.sphere.trig import Floats


def normalised(weights: Floats) -> Floats:
    """Weights that sum to one.

    Arguments:
        weights: (..., N), finite and >= 0, not all zero.

    Returns:
        The weights (..., N) over their sum. Dividing by the largest first keeps the sum finite.
    """
    shares: Floats = weights / weights.max(-1, keepdims=True)
    normal: Floats = shares / shares.sum(-1, keepdims=True)
    return normal


def unit_grams(grams: Floats) -> tuple[Floats, Floats]:
    """The norms of inputs, and the Gram matrices of their directions.

    Arguments:
        grams: Inner products of the inputs, (R, N, N).

    Returns:
        Norms (R, N), and inner products of the unit inputs (R, N, N). An input of norm zero becomes
        a unit vector at right angles to all others: with a weight of zero it takes no part in
        anything.
    """
    norms = np.sqrt(np.maximum(np.diagonal(grams, axis1=1, axis2=2), 0))
    lengths = np.where(norms > 0, norms, 1)
    unit = grams / lengths[:, :, None] / lengths[:, None, :]
    diagonal = np.arange(grams.shape[-1])
    unit[:, diagonal, diagonal] = 1
    return norms, unit
