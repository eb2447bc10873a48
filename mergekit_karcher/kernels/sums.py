"""The sum of a tensor, and its least entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_karcher.kernels.chunks import Piece, walk, working_device
from mergekit_karcher.kernels.workers import in_stripes, worker_count

# Elements a piece: a few float64 buffers of that size stay in the cache.
CHUNK_ELEMENTS = 1 << 16


def sum_and_least(tensor: torch.Tensor) -> tuple[float, float]:
    """The sum of all entries in float64, and the least of them or 0; NaN if any is not a number.

    Scratch: at most CHUNK_ELEMENTS values for each thread. One transfer to the host.
    """
    device = working_device(tensor.device)
    (view,), pieces = walk([tensor], CHUNK_ELEMENTS)
    found = torch.zeros(worker_count(device, len(pieces)), 2, dtype=torch.float64, device=device)

    def add_up(worker: int, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            part = piece.of(view).to(device)
            found[worker, 0] += part.sum(dtype=torch.float64)
            found[worker, 1] = torch.minimum(found[worker, 1], part.min())

    in_stripes(add_up, pieces, device, tensor.numel())
    total, least = torch.stack([found[:, 0].sum(), found[:, 1].min()]).tolist()
    return total, least
