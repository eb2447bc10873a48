"""Inner products of inputs: of whole tensors, by row, and summed over the tensors of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergekit_karcher.kernels.gram import Precision, grams
from mergekit_karcher.means.finite import refuse_not_finite
from mergekit_karcher.means.inputs import Inputs


@dataclass(frozen=True, eq=False)
class Products:
    """The inner products <W_ri, W_rj> = grams_rij 2^(exponents_ri + exponents_rj) of N vectors."""

    grams: NDArray[np.longdouble]  # (R, N, N)
    exponents: NDArray[np.int64]  # (R, N)

    def of(self, vectors: Sequence[int] | slice) -> Products:
        """Those of some of the vectors."""
        chosen = self.grams[:, vectors]
        return Products(chosen[:, :, vectors], self.exponents[:, vectors])

    def over_rows(self) -> Products:
        """One matrix (R = 1), of the vectors that all rows make together."""
        exponents = self.exponents.max(0, keepdims=True)
        return Products(self.scaled_to(exponents).sum(0, keepdims=True), exponents)

    def scaled_to(self, exponents: NDArray[np.int64]) -> NDArray[np.longdouble]:
        """The grams (R, N, N) that go with other exponents, (R, N) or (1, N)."""
        shift = self.exponents - exponents
        return np.ldexp(self.grams, shift[:, :, None] + shift[:, None, :])


def products_of(
    inputs: Inputs,
    *,
    with_base: bool = False,
    by_row: bool = False,
    precision: Precision = Precision.DOUBLE,
) -> Products:
    """The inner products of inputs, or of their differences from their base; one pass over them.

    In the shared metric if they have one; with_base adds the base, if there is one, as the last
    vector; by_row and precision as for `grams`. Raises `KarcherError` if a value is not finite; in
    SINGLE, where it may only be too large, that is left to a pass in DOUBLE.
    """
    matrices, exponents = grams(
        inputs.tensors,
        base=inputs.base,
        with_base=with_base and inputs.base is not None,
        metric=inputs.shared_metric,
        by_row=by_row,
        precision=precision,
    )
    if precision is Precision.SINGLE:
        return Products(matrices, exponents)
    finite = np.isfinite(np.diagonal(matrices, axis1=1, axis2=2)).all(0)
    if not finite.all():
        refuse_not_finite(inputs, int(np.flatnonzero(~finite)[0]))
    return Products(matrices, exponents)


def total(parts: Sequence[Products]) -> Products:
    """The inner products of N vectors that consist of parts, from those of each part."""
    exponents = np.max([part.exponents for part in parts], axis=0)
    zeros = np.zeros(parts[0].grams.shape, np.longdouble)
    return Products(sum((part.scaled_to(exponents) for part in parts), zeros), exponents)
