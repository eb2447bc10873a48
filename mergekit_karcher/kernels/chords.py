"""Chords between nearly parallel tensors, where their inner products cannot tell."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_karcher.kernels.chunks import Piece, walk, working_device
from mergekit_karcher.kernels.workers import in_stripes, worker_count

# Elements a piece, for two float64 buffers that stay in the cache.
CHUNK_ELEMENTS = 1 << 17


def squared_chord(first: torch.Tensor, second: torch.Tensor, norms: tuple[float, float]) -> float:
    """|W_1 / |W_1| - W_2 / |W_2||^2 of two tensors of one shape and device, in float64.

    norms: |W_1| and |W_2|, positive. The relative error is about 1e-9 at an angle of 1e-8 radians,
    where 2 - 2 cos has no digit left. Any floating dtypes and strides; borrowed.
    Scratch: for each thread 2 CHUNK_ELEMENTS float64 values. One transfer to the host.
    """
    device = working_device(first.device)
    views, pieces = walk([first, second], CHUNK_ELEMENTS)
    workers = worker_count(device, len(pieces))
    size = min(CHUNK_ELEMENTS, first.numel())
    buffers = torch.empty(workers, 2, size, dtype=torch.float64, device=device)
    sums = torch.zeros(workers, dtype=torch.float64, device=device)

    def add_up(worker: int, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            parts = [piece.of(view) for view in views]
            scaled = [
                buffers[worker, index, : part.numel()].view(part.shape)
                for index, part in enumerate(parts)
            ]
            for target, part, norm in zip(scaled, parts, norms, strict=True):
                target.copy_(part).div_(norm)
            flat = scaled[0].sub_(scaled[1]).view(-1)
            sums[worker] += torch.dot(flat, flat)

    in_stripes(add_up, pieces, device, 2 * first.numel())
    return float(sums.sum())
