"""Inner products of inputs: of whole tensors, by row, and summed over the tensors of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_karcher.kernels.gram import grams
from mergekit_karcher.means.finite import refuse_not_finite
from mergekit_karcher.means.inputs import Inputs


@dataclass(frozen=True, eq=False)
class Products:
    """The inner products of N vectors, R times.

    grams: (R, N, N) long double. exponents: (R, N) integers.
    <W_ri, W_rj> = grams_rij 2^(exponents_ri + exponents_rj).
    """

    grams: NDArray[np.longdouble]
    exponents: NDArray[np.int64]

    def of(self, vectors: Sequence[int] | slice) -> Products:
        """Those of some of the vectors."""
        chosen = self.grams[:, vectors]
        return Products(chosen[:, :, vectors], self.exponents[:, vectors])

    def over_rows(self) -> Products:
        """One matrix (R = 1), of the vectors that all rows make together."""
        exponents = self.exponents.max(0, keepdims=True)
        shift = self.exponents - exponents
        scaled = np.ldexp(self.grams, shift[:, :, None] + shift[:, None, :])
        return Products(scaled.sum(0, keepdims=True), exponents)


def products_of(
    inputs: Inputs, *, with_base: bool = False, by_row: bool = False, exact: bool = False
) -> Products:
    """The inner products of inputs, or of their differences from their base; one pass over them.

    Arguments:
        inputs: N of them; borrowed.
        with_base: Add the base, if there is one, as one more vector, the last.
        by_row: One matrix for each index of the first axis, instead of one for all.
        exact: Better than float64, for about twice the time.

    Returns:
        The products, in the shared metric if the inputs have one.

    Raises:
        KarcherError: If an input, the base or a difference is not finite.
    """
    with_base = with_base and inputs.base is not None
    matrices, exponents = grams(
        inputs.tensors,
        base=inputs.base,
        with_base=with_base,
        metric=inputs.shared_metric,
        by_row=by_row,
        exact=exact,
    )
    finite = np.isfinite(np.diagonal(matrices, axis1=1, axis2=2)).all(0)
    if not finite.all():
        refuse_not_finite(inputs, int(np.flatnonzero(~finite)[0]))
    return Products(matrices, exponents)


def total(parts: Sequence[Products]) -> Products:
    """The inner products of N vectors that consist of parts.

    Arguments:
        parts: Those of each part, all of N vectors and R times.

    Returns:
        Their sum.
    """
    exponents = np.max([part.exponents for part in parts], axis=0)
    summed = np.zeros(parts[0].grams.shape, np.longdouble)
    for part in parts:
        shift = part.exponents - exponents
        summed += np.ldexp(part.grams, shift[:, :, None] + shift[:, None, :])
    return Products(summed, exponents)


def needs_exact(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the inner products of tensors must be exact at once.

    float64 products always are. On an accelerator a second pass, at wide angles, would be a second
    synchronisation.
    """
    return tensors[0].device.type != "cpu" or any(t.dtype == torch.float64 for t in tensors)
