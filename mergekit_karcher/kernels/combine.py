"""The second pass: a linear combination of N tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_karcher.kernels.chunks import Piece, walk, working_device
from mergekit_karcher.kernels.workers import in_stripes, worker_count

# Elements a piece: less pays for the calls, more falls out of the cache. Measured on 2 cores.
CHUNK_ELEMENTS = 1 << 18

# Coefficients up to here keep products with any half-precision value inside float32's range.
_LARGEST_SINGLE = 2.0**60


def combine(
    tensors: Sequence[torch.Tensor], coefficients: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """sum_i coefficients_i W_i as a new contiguous tensor of that dtype.

    tensors: N >= 1 of one shape and device, any floating dtypes and strides; borrowed. Sums run in
    float64, or in float32 for float16 and bfloat16, which has 13 bits more than either: what the
    final rounding leaves is at most half a unit of the result and a little. A coefficient of zero
    leaves its tensor out.
    Scratch: CHUNK_ELEMENTS sums for each thread. No synchronisation with the device.
    """
    first = tensors[0]
    result = torch.empty(first.shape, dtype=dtype, device=first.device)
    terms = [(t, float(k)) for t, k in zip(tensors, coefficients, strict=True) if k != 0]
    if not terms:
        return result.zero_()
    half = (torch.float16, torch.bfloat16)
    single = all(t.dtype in half and abs(k) < _LARGEST_SINGLE for t, k in terms)
    device = working_device(first.device)
    (target, *views), pieces = walk([result, *(t for t, _ in terms)], CHUNK_ELEMENTS)
    factors = [k for _, k in terms]
    sums = torch.empty(
        worker_count(device, len(pieces)),
        min(CHUNK_ELEMENTS, first.numel()),
        dtype=torch.float32 if single and dtype in half else torch.float64,
        device=device,
    )

    def add_up(worker: int, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            part = piece.of(target)
            total = sums[worker, : part.numel()].view(part.shape)
            # The first product, not zero plus it, so that a merge of one model keeps its -0.0.
            total.copy_(piece.of(views[0])).mul_(factors[0])
            for view, factor in zip(views[1:], factors[1:], strict=True):
                total.add_(piece.of(view).to(device), alpha=factor)
            part.copy_(total)

    in_stripes(add_up, pieces, device, len(views) * first.numel())
    return result
