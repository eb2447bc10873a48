"""Elementwise means of tensors, each element weighted by its precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_karcher.kernels.chunks import Piece
from mergekit_karcher.kernels.streaming import Tensors, shaped_as, stream

# Elements a piece: four float64 buffers of that size stay in the cache.
CHUNK_ELEMENTS = 1 << 16


def precision_mean(
    tensors: Sequence[torch.Tensor],
    metrics: Sequence[torch.Tensor | None],
    weights: Sequence[float],
    floors: Sequence[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """sum_k w_k (G_k + f_k) W_k / sum_k w_k (G_k + f_k), element by element, in a new tensor.

    Everything runs in float64 and is rounded once. Elements whose denominator is zero get
    sum_k w_k W_k / sum_k w_k. Tensors and metrics have one shape and device, any floating dtypes
    and strides; a metric of None is one everywhere, without a floor.
    """
    first = tensors[0]
    result = torch.empty(first.shape, dtype=dtype, device=first.device)
    given = [metric for metric in metrics if metric is not None]
    total = sum(weights)
    positive = any(
        metric is None or floor * weight > 0
        for metric, weight, floor in zip(metrics, weights, floors, strict=True)
    )

    def fill_piece(_: Piece, parts: Tensors, scratch: Tensors, __: torch.Tensor) -> None:
        target, metric_parts = parts[-1], iter(parts[len(tensors) :])
        above, below, precision, value = shaped_as(target, scratch[0])
        above.zero_()
        below.zero_()
        for part, metric, weight, floor in zip(parts, metrics, weights, floors, strict=False):
            if metric is None:
                precision.fill_(weight)
            else:
                precision.copy_(next(metric_parts)).add_(floor).mul_(weight)
            below.add_(precision)
            above.addcmul_(value.copy_(part), precision)
        above.div_(below)
        if not positive and not bool(below.all()):
            precision.zero_()
            for part, weight in zip(parts, weights, strict=False):
                precision.add_(value.copy_(part), alpha=weight / total)
            torch.where(below == 0, precision, above, out=above)
        target.copy_(above)

    shape = (4, min(CHUNK_ELEMENTS, first.numel()))
    stream(fill_piece, [*tensors, *given], CHUNK_ELEMENTS, out=result, scratch=[shape])
    return result
