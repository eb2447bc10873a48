"""Elementwise means of tensors, each element weighted by its precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_karcher.kernels.chunks import Piece, walk, working_device
from mergekit_karcher.kernels.workers import in_stripes, worker_count

# Elements a piece: four float64 buffers of that size stay in the cache.
CHUNK_ELEMENTS = 1 << 16


def precision_mean(
    tensors: Sequence[torch.Tensor],
    metrics: Sequence[torch.Tensor | None],
    weights: Sequence[float],
    floors: Sequence[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """sum_k w_k (G_k + f_k) W_k / sum_k w_k (G_k + f_k), element by element, as a new tensor.

    tensors, metrics: N >= 1 of one shape and device, any floating dtypes and strides; borrowed; a
    metric of None is one everywhere. The denominator must be positive. Sums and the quotient run in
    float64, and are rounded once.
    Scratch: for each thread 4 CHUNK_ELEMENTS float64 values, whatever N is.
    """
    first = tensors[0]
    result = torch.empty(first.shape, dtype=dtype, device=first.device)
    given = [metric for metric in metrics if metric is not None]
    device = working_device(first.device)
    (target, *views), pieces = walk([result, *tensors, *given], CHUNK_ELEMENTS)
    sources, rest = views[: len(tensors)], iter(views[len(tensors) :])
    precisions = [None if metric is None else next(rest) for metric in metrics]
    size = min(CHUNK_ELEMENTS, first.numel())
    buffers = torch.empty(
        worker_count(device, len(pieces)), 4, size, dtype=torch.float64, device=device
    )

    def add_up(worker: int, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            part = piece.of(target)
            above, below, precision, value = (
                buffer[: part.numel()].view(part.shape) for buffer in buffers[worker]
            )
            above.zero_()
            below.zero_()
            for source, metric, weight, floor in zip(
                sources, precisions, weights, floors, strict=True
            ):
                if metric is None:
                    precision.fill_(weight)
                else:
                    precision.copy_(piece.of(metric)).add_(floor).mul_(weight)
                below.add_(precision)
                above.addcmul_(value.copy_(piece.of(source)), precision)
            part.copy_(above.div_(below))

    in_stripes(add_up, pieces, device, len(views) * first.numel())
    return result
