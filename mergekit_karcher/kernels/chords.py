"""Chords between nearly parallel tensors, where their inner products cannot tell."""

from __future__ import annotations

import math

import torch

from mergekit_karcher.kernels.chunks import Piece
from mergekit_karcher.kernels.shared_metric import SharedMetric
from mergekit_karcher.kernels.streaming import Tensors, shaped_as, stream

# Elements a piece, for three float64 buffers that stay in the cache.
CHUNK_ELEMENTS = 1 << 17


def squared_chord(
    first: torch.Tensor,
    second: torch.Tensor,
    norms: tuple[float, float],
    metric: SharedMetric | None = None,
) -> float:
    """|W_1 / |W_1| - W_2 / |W_2||^2, from 0 to 4, of two borrowed tensors of one shape and device.

    norms: |W_1| and |W_2|, positive, in the metric if there is one. The relative error is about
    1e-9 at an angle of 1e-8 radians, where 2 - 2 cos has no digit left. One transfer to the host.
    """
    exponent = 0 if metric is None else metric.exponent
    lengths = [math.ldexp(norm, -exponent) for norm in norms]

    def add_piece(_: Piece, parts: Tensors, scratch: Tensors, total: torch.Tensor) -> None:
        one, other, root = shaped_as(parts[0], scratch[0])
        one.copy_(parts[0]).div_(lengths[0])
        other.copy_(parts[1]).div_(lengths[1])
        one.sub_(other)
        if metric is not None:
            one.mul_(metric.roots(parts[2:], root))
        flat = one.view(-1)
        total.add_(torch.dot(flat, flat))

    shape = (3, min(CHUNK_ELEMENTS, first.numel()))
    read = [first, second, *(() if metric is None else metric.tensors)]
    return float(stream(add_piece, read, CHUNK_ELEMENTS, scratch=[shape], sums=()).sum())
