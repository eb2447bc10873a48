"""What comes out of the solver: means as coefficients, and how each was arrived at."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_karcher.sphere.trig import Bools, Floats


class Status(enum.Enum):
    """How the mean was found; the value is the sentence for a person, with the remedy."""

    CONVERGED = "converged"
    NOT_CONVERGED = "did not converge within max_iter steps; raise max_iter"
    NOT_UNIQUE = (
        "the inputs do not lie in one open hemisphere, which a mean needs to be certainly unique; "
        "the weighted linear mean, unrescaled, was returned; leave an input out to change that"
    )
    ZERO = "no input with a weight has any length; the weighted linear mean was returned"


@dataclass(frozen=True, eq=False)
class SphereMeans:
    """The means on R spheres of N inputs each, W = sum_i coefficients_i W_i.

    coefficients: (R, N) float64; zero for an input without direction, unless none has one.
    angles: (R, N) float64, radians from each input to the mean; NaN where either has no direction.
        Computed from a Gram matrix: below 1e-7 rad only the order of magnitude is meaningful.
    iterations: (R,) steps taken, over the start that won.
    residuals: (R,) radians, the tangent step that remains; NaN for a fall-back.
    unique: (R,) whether the inputs were proven to have one mean, to which the steps lead.
    statuses: (R,) of Status.
    """

    coefficients: Floats
    angles: Floats
    iterations: NDArray[np.int64]
    residuals: Floats
    unique: Bools
    statuses: NDArray[Any]
