"""The functions of an angle that the sphere's logarithm needs, safe at zero and near pi."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# float64, or the wider long double that some platforms have.
Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

# Below this angle the closed form of `curvature` loses more to cancellation (eps / theta^2) than
# three terms of its series lose to truncation (theta^6).
_SERIES_BELOW = 0.02

# Near pi, theta / sin(theta) has a true pole. Steps are capped anyway; this keeps them finite.
_SMALLEST_SINE = 1e-8


class AngleTerms(NamedTuple):
    """Functions of theta, elementwise; all arrays of one shape and dtype."""

    theta: Floats  # radians in [0, pi]
    theta_over_sin: Floats  # theta / sin(theta), 1 at zero
    theta_cot: Floats  # theta cot(theta), 1 at zero
    curvature: Floats  # (1 - theta cot(theta)) / sin(theta)^2, 1/3 at zero


def angle_terms(versine: Floats) -> AngleTerms:
    """Those of angles with versines h = 1 - cos(theta) in [0, 2], of any shape.

    They are finite everywhere; near pi, where they have a pole, they are capped.
    """
    # Full relative accuracy at both ends, which arccos(1 - h) does not have.
    theta = 2 * np.arctan2(np.sqrt(versine), np.sqrt(2 - versine))
    sine = np.maximum(np.sqrt(versine * (2 - versine)), _SMALLEST_SINE * (versine > 1))
    tiny = theta < _SERIES_BELOW
    safe_sine = np.where(sine == 0, 1.0, sine)
    theta_over_sin = np.where(sine == 0, 1.0, theta / safe_sine)
    theta_cot = theta_over_sin * (1 - versine)
    square = theta * theta
    curvature = np.where(
        tiny,
        1 / 3 + square * (2 / 15 + square * (2 / 63)),
        (1 - theta_cot) / np.where(tiny, 1.0, safe_sine * safe_sine),
    )
    return AngleTerms(theta, theta_over_sin, theta_cot, curvature)


def times(matrices: Floats, vectors: Floats) -> Floats:
    """The products of matrices (R, M, N) with one vector for each of them (R, N), as (R, M)."""
    return (matrices @ vectors[:, :, None])[:, :, 0]
