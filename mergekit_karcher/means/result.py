"""What a Karcher mean comes with: its coefficients, and how they were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mergekit_karcher.sphere.results import SphereMeans, Status
from mergekit_karcher.sphere.trig import Floats

# The worst one of many rows comes first.
_WORST = (Status.NOT_UNIQUE, Status.NOT_CONVERGED, Status.CONVERGED, Status.ZERO)


@dataclass(frozen=True, eq=False)
class KarcherMean:
    """The mean W = base + sum_i coefficients_i (W_i - base) of N inputs, and what is known of it.

    coefficients: (N,) float64, or with granularity row (R, N), one set for each row; zero for an
        input without weight, or without direction unless none has one. Without a base,
        W = sum_i coefficients_i W_i.
    angles: (N,) float64, radians from each input to the result, as seen from the origin, the
        largest of the rows; NaN where either has no direction or the input has no weight. Computed
        from a Gram matrix: below 1e-7 rad only the order of magnitude is meaningful.
    iterations: steps taken, over the start that won; the most of any row.
    residual: radians, the tangent step that remains at the result; the longest of the rows; NaN for
        a fall-back.
    unique: whether the inputs, in every row, were proven to have one mean, to which the steps lead.
    status: how it ended, for the worst of the rows; `status.value` is a sentence with the remedy.
    length: |W - base|, in the metric if there is one; the longest of the rows.
    """

    coefficients: Floats
    angles: Floats
    iterations: int
    residual: float
    unique: bool
    status: Status
    length: float

    @property
    def converged(self) -> bool:
        """Whether the coefficients are those of a Karcher mean, to within the tolerance."""
        return self.status in (Status.CONVERGED, Status.ZERO)

    def with_others(self, places: Sequence[int], count: int) -> KarcherMean:
        """The same mean as one of count inputs, of which these N stand at places.

        The others have no weight: their coefficients are zero, their angles NaN.
        """
        if len(places) == count:
            return self
        coefficients = np.zeros((*self.coefficients.shape[:-1], count))
        angles = np.full(count, np.nan)
        coefficients[..., list(places)] = self.coefficients
        angles[list(places)] = self.angles
        return replace(self, coefficients=coefficients, angles=angles)


def over_rows(
    means: Sequence[SphereMeans], coefficients: Floats, lengths: Sequence[Floats]
) -> KarcherMean:
    """One result for the means, and their lengths, of many rows, in blocks of some rows each.

    It holds the coefficients of all rows, (N,) or (R, N), and of everything else the worst.
    """
    statuses = {status for block in means for status in block.statuses}
    return KarcherMean(
        coefficients,
        np.fmax.reduce(np.concatenate([block.angles for block in means]), axis=0),
        max(int(block.iterations.max()) for block in means),
        float(np.fmax.reduce(np.concatenate([block.residuals for block in means]))),
        all(bool(block.unique.all()) for block in means),
        next(status for status in _WORST if status in statuses),
        max(float(block.max()) for block in lengths),
    )
