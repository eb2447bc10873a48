"""The second pass: linear combinations of N tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_karcher.kernels.chunks import Piece, rows_of, working_device
from mergekit_karcher.kernels.streaming import Tensors, shaped_as, stream

# Elements a piece: less pays for the calls, more falls out of the cache. Measured on 2 cores.
CHUNK_ELEMENTS = 1 << 18

# Coefficients up to here keep products with any half-precision value inside float32's range.
_LARGEST_SINGLE = 2.0**60

_HALF = (torch.float16, torch.bfloat16)


def combine(
    tensors: Sequence[torch.Tensor],
    coefficients: NDArray[np.floating],
    dtype: torch.dtype,
    *,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """A new tensor of that dtype: sum_i k_i W_i, or base + sum_i k_i (W_i - base).

    coefficients: k (N,), or (R, N) with one set for each index of the first axis; one of zero
    leaves its tensor out. All tensors have one shape and device, any floating dtypes and strides.
    Sums run in float64; where all is float16 or bfloat16 in float32, which has 13 bits more than
    either: the result is off by at most half a unit and a little. No synchronisation.
    """
    first = tensors[0]
    result = torch.empty(first.shape, dtype=dtype, device=first.device)
    used = [index for index in range(len(tensors)) if np.any(coefficients[..., index])]
    if not used:
        return result.zero_() if base is None else result.copy_(base)
    read = [*(tensors[index] for index in used), *(() if base is None else (base,))]
    single = all(one in _HALF for one in (dtype, *(tensor.dtype for tensor in read)))
    single = single and max(coefficients.max(), -coefficients.min()) < _LARGEST_SINGLE
    by_row = coefficients.ndim == 2
    columns = torch.from_numpy(coefficients).to(working_device(first.device)) if by_row else None

    def fill(piece: Piece, parts: Tensors, scratch: Tensors, _: torch.Tensor) -> None:
        target = parts[-1]
        total, *spare = shaped_as(target, scratch[0])
        origin = None if base is None else spare[1].copy_(parts[-2])
        for index, part in zip(used, parts, strict=False):
            # The first summand of a total is its first product, not zero plus it, so that a merge
            # of one model keeps its -0.0.
            begins = index == used[0]
            # Into memory that is there: torch would take new memory for each conversion.
            term = (total if begins else spare[0]).copy_(part)
            if origin is not None:
                term.sub_(origin)
            if columns is None:
                factor = float(coefficients[index])
                total.mul_(factor) if begins else total.add_(term, alpha=factor)
            else:
                column = columns[rows_of(piece), index].to(total.dtype)
                column = column.view(-1, *[1] * (part.ndim - 1 if not piece.leading else 0))
                total.mul_(column) if begins else total.addcmul_(term, column)
        target.copy_(total if origin is None else total.add_(origin))

    shape = (2 if base is None else 3, min(CHUNK_ELEMENTS, first.numel()))
    kind = torch.float32 if single else torch.float64
    stream(
        fill, read, CHUNK_ELEMENTS, out=result, scratch=[shape], scratch_dtype=kind, by_row=by_row
    )
    return result
