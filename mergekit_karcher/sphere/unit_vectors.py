"""Inputs of any length and weight as unit vectors, with weights that sum to one."""

from __future__ import annotations

import numpy as np

from mergekit_karcher.sphere.trig import Floats


def normalised(weights: Floats) -> Floats:
    """Weights (..., N), finite and >= 0, not all zero, over their sum."""
    # Dividing by the largest first keeps the sum finite.
    shares: Floats = weights / weights.max(-1, keepdims=True)
    shares /= shares.sum(-1, keepdims=True)
    return shares


def unit_grams(grams: Floats) -> tuple[Floats, Floats]:
    """The norms (R, N) of inputs, and the inner products (R, N, N) of the unit inputs.

    An input of norm zero becomes a unit vector at right angles to all others: with a weight of zero
    it takes no part in anything.
    """
    norms = np.sqrt(np.maximum(np.diagonal(grams, axis1=1, axis2=2), 0))
    lengths = np.where(norms > 0, norms, 1)
    unit = grams / lengths[:, :, None] / lengths[:, None, :]
    diagonal = np.arange(grams.shape[-1])
    unit[:, diagonal, diagonal] = 1
    return norms, unit
