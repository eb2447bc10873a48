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

    All but the statuses as in `KarcherMean`, for each sphere instead of the worst of them.
    """

    coefficients: Floats  # (R, N)
    angles: Floats  # (R, N)
    iterations: NDArray[np.int64]  # (R,)
    residuals: Floats  # (R,)
    unique: Bools  # (R,)
    statuses: NDArray[Any]  # (R,) of Status
