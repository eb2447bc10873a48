"""The second pass: linear combinations of N tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_karcher.kernels.chunks import Piece, rows_of, working_device
from mergekit_karcher.kernels.streaming import Kernel, Tensors, shaped_as, stream

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
    """sum_i coefficients_i W_i, or base + sum_i coefficients_i (W_i - base).

    Sums run in float64, or in float32 for float16 and bfloat16, which has 13 bits more than either:
    what the final rounding leaves is at most half a unit of the result and a little.
    Scratch: 3 CHUNK_ELEMENTS values for each thread. No synchronisation with the device.

    Arguments:
        tensors: The W_i, N >= 1 of one shape and device, any floating dtypes and strides. Borrowed.
        coefficients: (N,), or (R, N) with one set for each index of the first axis. A coefficient
            of zero leaves its tensor out.
        dtype: That of the result.
        base: One more tensor of that shape and device. Borrowed.

    Returns:
        A new, contiguous tensor.
    """
    first = tensors[0]
    result = torch.empty(first.shape, dtype=dtype, device=first.device)
    used = [index for index in range(len(tensors)) if np.any(coefficients[..., index])]
    if not used:
        return result.zero_() if base is None else result.copy_(base)
    read = [*(tensors[index] for index in used), *(() if base is None else (base,))]
    single = dtype in _HALF and all(tensor.dtype in _HALF for tensor in read)
    single = single and max(coefficients.max(), -coefficients.min()) < _LARGEST_SINGLE
    by_row = coefficients.ndim == 2
    plain = base is None and not by_row
    if plain:
        kernel = _plain_sum(coefficients[used].tolist())
    else:
        kernel = _general_sum(coefficients, used, working_device(first.device), base is not None)
    stream(
        kernel,
        read,
        CHUNK_ELEMENTS,
        out=result,
        scratch=[(1 if plain else 3, min(CHUNK_ELEMENTS, first.numel()))],
        scratch_dtype=torch.float32 if single else torch.float64,
        by_row=by_row,
    )
    return result


# The first summand of a total is its first product, not zero plus it, so that a merge of one model
# keeps its -0.0.


def _plain_sum(factors: Sequence[float]) -> Kernel:
    """One factor for each tensor."""

    def fill_piece(_: Piece, parts: Tensors, scratch: Tensors, __: torch.Tensor) -> None:
        first, *others, target = parts
        (total,) = shaped_as(target, scratch[0])
        total.copy_(first).mul_(factors[0])
        for part, factor in zip(others, factors[1:], strict=True):
            total.add_(part.to(total.device), alpha=factor)
        target.copy_(total)

    return fill_piece


def _general_sum(
    coefficients: NDArray[np.floating], used: Sequence[int], device: torch.device, based: bool
) -> Kernel:
    """A factor for each tensor, or for each of its rows; the last tensor may be the base."""
    columns = torch.from_numpy(coefficients).to(device) if coefficients.ndim == 2 else None

    def fill_piece(piece: Piece, parts: Tensors, scratch: Tensors, _: torch.Tensor) -> None:
        target = parts[-1]
        total, term, origin = shaped_as(target, scratch[0])
        if based:
            origin.copy_(parts[-2])
        for index, part in zip(used, parts, strict=False):
            product = total if index == used[0] else term
            product.copy_(part)
            if based:
                product.sub_(origin)
            if columns is None:
                factor = float(coefficients[index])
                total.mul_(factor) if product is total else total.add_(term, alpha=factor)
            else:
                column = columns[rows_of(piece), index].to(total.dtype)
                column = column.view(-1, *[1] * (part.ndim - 1 if not piece.leading else 0))
                total.mul_(column) if product is total else total.addcmul_(term, column)
        if based:
            total.add_(origin)
        target.copy_(total)

    return fill_piece
