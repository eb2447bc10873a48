"""How much each of several models counts where every element is weighted by its precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_karcher.kernels.chunks import Piece
from mergekit_karcher.kernels.precision import CHUNK_ELEMENTS
from mergekit_karcher.kernels.streaming import Tensors, shaped_as, stream


def precision_shares(
    metrics: Sequence[torch.Tensor | None], weights: Sequence[float], floors: Sequence[float]
) -> list[float]:
    """The mean over the elements of w_k (G_k + f_k) / sum_j w_j (G_j + f_j), for each of N models.

    As in `precision_mean`; elements whose denominator is zero have w_k / sum_j w_j.
    """
    given = [metric for metric in metrics if metric is not None]
    parts_of_all = [weight / sum(weights) for weight in weights]
    if not given or not given[0].numel():
        return parts_of_all

    def add_piece(_: Piece, parts: Tensors, scratch: Tensors, sums: torch.Tensor) -> None:
        *precisions, below = shaped_as(parts[0], scratch[0])
        metric_parts = iter(parts)
        below.zero_()
        for precision, metric, weight, floor in zip(
            precisions, metrics, weights, floors, strict=True
        ):
            if metric is None:
                precision.fill_(weight)
            else:
                precision.copy_(next(metric_parts)).add_(floor).mul_(weight)
            below.add_(precision)
        for place, (precision, part) in enumerate(zip(precisions, parts_of_all, strict=True)):
            sums[place] += torch.where(below > 0, precision / below, part).sum()

    shape = (len(metrics) + 1, min(CHUNK_ELEMENTS, given[0].numel()))
    sums = stream(add_piece, given, CHUNK_ELEMENTS, scratch=[shape], sums=(len(metrics),))
    return [float(value) / given[0].numel() for value in sums.sum(0)]
