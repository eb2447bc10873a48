"""The second pass: linear combinations of N tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_karcher.kernels.chunks import Piece, rows_of, walk, working_device
from mergekit_karcher.kernels.workers import in_stripes, worker_count

# Elements a piece: less pays for the calls, more falls out of the cache. Measured on 2 cores.
CHUNK_ELEMENTS = 1 << 18

# Coefficients up to here keep products with any half-precision value inside float32's range.
_LARGEST_SINGLE = 2.0**60


def combine(
    tensors: Sequence[torch.Tensor],
    coefficients: NDArray[np.floating],
    dtype: torch.dtype,
    *,
    base: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_i coefficients_i W_i, or base + sum_i coefficients_i (W_i - base), as a new tensor.

    tensors: N >= 1 of one shape and device, any floating dtypes and strides; borrowed. base: one
    more of them. coefficients: (N,), or (R, N) with one set for each index of the first axis. out:
    contiguous, of that shape and dtype, to be filled instead of a new tensor.
    Sums run in float64, or in float32 for float16 and bfloat16, which has 13 bits more than either:
    what the final rounding leaves is at most half a unit of the result and a little. A coefficient
    of zero leaves its tensor out.
    Scratch: 3 CHUNK_ELEMENTS values for each thread. No synchronisation with the device.
    """
    first = tensors[0]
    result = torch.empty(first.shape, dtype=dtype, device=first.device) if out is None else out
    by_row = coefficients.ndim == 2
    used = [index for index in range(len(tensors)) if np.any(coefficients[..., index])]
    if not used:
        return result.zero_() if base is None else result.copy_(base)
    chosen = [tensors[index] for index in used]
    half = (torch.float16, torch.bfloat16)
    held = [*chosen, *(() if base is None else (base,))]
    single = all(t.dtype in half for t in held) and (
        max(coefficients.max(), -coefficients.min()) < _LARGEST_SINGLE
    )
    device = working_device(first.device)
    (target, *views), pieces = walk([result, *held], CHUNK_ELEMENTS, by_row=by_row)
    sums = torch.empty(
        worker_count(device, len(pieces)),
        1 if base is None and not by_row else 3,
        min(CHUNK_ELEMENTS, first.numel()),
        dtype=torch.float32 if single and dtype in half else torch.float64,
        device=device,
    )
    columns = torch.from_numpy(coefficients).to(device) if by_row else None

    def add_up(worker: int, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            part = piece.of(target)
            total, term, origin = (
                sums[worker, min(index, sums.shape[1] - 1), : part.numel()].view(part.shape)
                for index in range(3)
            )
            if base is not None:
                origin.copy_(piece.of(views[-1]))
            for index, view in enumerate(views[: len(chosen)]):
                source, own = piece.of(view), used[index]
                # The first product, not zero plus it, so that a merge of one model keeps its -0.0.
                target_sum = total if index == 0 else term
                if index > 0 and base is None and columns is None:
                    total.add_(source.to(device), alpha=float(coefficients[own]))
                    continue
                target_sum.copy_(source)
                if base is not None:
                    target_sum.sub_(origin)
                if columns is None:
                    factor = float(coefficients[own])
                    total.mul_(factor) if index == 0 else total.add_(term, alpha=factor)
                else:
                    column = columns[rows_of(piece), own].to(sums.dtype)
                    column = column.view(-1, *[1] * (part.ndim - 1 if not piece.leading else 0))
                    total.mul_(column) if index == 0 else total.addcmul_(term, column)
            if base is not None:
                total.add_(origin)
            part.copy_(total)

    in_stripes(add_up, pieces, device, len(views) * first.numel())
    return result
