"""The functions of an angle that the sphere's logarithm needs, safe at zero and near pi."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# float64, or the wider long double that some platforms have.
Floats = NDArray[np.floating]

# Below this angle the closed form of `curvature` loses more to cancellation (eps / theta^2) than
# three terms of its series lose to truncation (theta^6).
_SERIES_BELOW = 0.02

# Near pi, theta / sin(theta) has a true pole. Steps are capped anyway; this keeps them finite.
_SMALLEST_SINE = 1e-8


class AngleTerms(NamedTuple):
    """Functions of theta, elementwise; all arrays of one shape and dtype.

    theta: radians in [0, pi].
    stretch: theta / sin(theta), 1 at zero.
    cotangent: theta cot(theta), 1 at zero.
    curvature: (1 - theta cot(theta)) / sin(theta)^2, 1/3 at zero.
    """

    theta: Floats
    stretch: Floats
    cotangent: Floats
    curvature: Floats


def angle_terms(versine: Floats) -> AngleTerms:
    """The terms above from h = 1 - cos(theta), h in [0, 2].

    theta = 2 atan2(sqrt(h), sqrt(2 - h)) keeps full relative accuracy at both ends, where
    arccos(1 - h) does not.
    """
    theta = 2 * np.arctan2(np.sqrt(versine), np.sqrt(2 - versine))
    sine = np.maximum(np.sqrt(versine * (2 - versine)), _SMALLEST_SINE * (versine > 1))
    tiny = theta < _SERIES_BELOW
    safe_sine = np.where(sine == 0, 1.0, sine)
    stretch = np.where(sine == 0, 1.0, theta / safe_sine)
    cotangent = stretch * (1 - versine)
    square = theta * theta
    curvature = np.where(
        tiny,
        1 / 3 + square * (2 / 15 + square * (2 / 63)),
        (1 - cotangent) / np.where(tiny, 1.0, safe_sine * safe_sine),
    )
    return AngleTerms(theta, stretch, cotangent, curvature)


def times(matrices: Floats, vectors: Floats) -> Floats:
    """The products of R matrices (R, M, N) with a vector each (R, N), as (R, M)."""
    product: Floats = (matrices @ vectors[:, :, None])[:, :, 0]
    return product
