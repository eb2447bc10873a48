"""The length of the mean, and how it changes with the inputs."""

from __future__ import annotations

import enum

import numpy as np

from mergekit_karcher.sphere.trig import Floats, times


class Magnitude(enum.Enum):
    """The length of the mean, from weights w_i that sum to one and the norms n_i = |W_i|."""

    ARITHMETIC = "arithmetic"  # sum_i w_i n_i (paper, equation 6)
    GEOMETRIC = "geometric"  # prod_i n_i^(w_i); zero as soon as one input is
    LINEAR = "linear"  # |sum_i w_i W_i|


def magnitude_ratios(magnitude: Magnitude, shares: Floats, norms: Floats, unit: Floats) -> Floats:
    """The length of the mean over the norm of each input, (R, N); zero for inputs of norm zero.

    shares (N,): weights that sum to one. norms: (R, N). unit (R, N, N): Grams of the unit inputs.
    """
    lengths = np.where(norms > 0, norms, 1)
    if magnitude is Magnitude.GEOMETRIC:
        logarithms = np.log(lengths)
        ratios = np.exp((logarithms @ shares)[:, None] - logarithms)
        return np.where((norms > 0).all(-1, keepdims=True), ratios, 0)
    if magnitude is Magnitude.LINEAR:
        largest = norms.max(-1, keepdims=True)
        parts = shares * (norms / np.where(largest > 0, largest, 1))
        squared = np.maximum((parts * times(unit, parts)).sum(-1, keepdims=True), 0)
        return np.where(norms > 0, np.sqrt(squared) * (largest / lengths), 0)
    return np.where(norms > 0, (norms @ shares)[:, None] / lengths, 0)


def magnitude_gradients(
    magnitude: Magnitude, shares: Floats, norms: Floats, length: Floats
) -> Floats:
    """The gradients of the length M of the mean, (R, 1) > 0, each times its norm: n_i dM/dW_i.

    As coefficients over the unit inputs, (R, N, N): a row for each input.
    """
    if magnitude is Magnitude.LINEAR:
        parts = shares * norms
        return parts[:, :, None] * (parts[:, None, :] / length[:, :, None])
    scale = length * shares if magnitude is Magnitude.GEOMETRIC else norms * shares
    return scale[:, :, None] * np.eye(len(shares))
