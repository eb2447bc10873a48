"""Chords between nearly parallel tensors, where their inner products cannot tell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mergekit_karcher.kernels.chunks import Piece, walk, working_device
from mergekit_karcher.kernels.shared_metric import SharedMetric
from mergekit_karcher.kernels.workers import in_stripes, worker_count

# Elements a piece, for three float64 buffers that stay in the cache.
CHUNK_ELEMENTS = 1 << 17


def squared_chord(
    first: torch.Tensor,
    second: torch.Tensor,
    norms: tuple[float, float],
    metric: SharedMetric | None = None,
) -> float:
    """|W_1 / |W_1| - W_2 / |W_2||^2 of two tensors of one shape and device, in float64.

    norms: |W_1| and |W_2|, positive; of the metric, if there is one, as all lengths are then.
    The relative error is about 1e-9 at an angle of 1e-8 radians, where 2 - 2 cos has no digit left.
    Any floating dtypes and strides; borrowed.
    Scratch: for each thread 3 CHUNK_ELEMENTS float64 values. One transfer to the host.
    """
    device = working_device(first.device)
    metrics = () if metric is None else metric.tensors
    views, pieces = walk([first, second, *metrics], CHUNK_ELEMENTS)
    exponent = 0 if metric is None else metric.exponent
    lengths = [math.ldexp(norm, -exponent) for norm in norms]
    workers = worker_count(device, len(pieces))
    size = min(CHUNK_ELEMENTS, first.numel())
    buffers = torch.empty(workers, 3, size, dtype=torch.float64, device=device)
    sums = torch.zeros(workers, dtype=torch.float64, device=device)

    def add_up(worker: int, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            parts = [piece.of(view) for view in views]
            one, other, root = (
                buffer[: parts[0].numel()].view(parts[0].shape) for buffer in buffers[worker]
            )
            for target, part, length in zip((one, other), parts[:2], lengths, strict=True):
                target.copy_(part).div_(length)
            one.sub_(other)
            if metric is not None:
                one.mul_(metric.roots(parts[2:], root))
            flat = one.view(-1)
            sums[worker] += torch.dot(flat, flat)

    in_stripes(add_up, pieces, device, 2 * first.numel())
    return float(sums.sum())
