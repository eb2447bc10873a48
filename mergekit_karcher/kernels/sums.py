"""The sum of a tensor, and its least entry."""

from __future__ import annotations

import torch

from mergekit_karcher.kernels.chunks import Piece
from mergekit_karcher.kernels.streaming import Tensors, stream

# Elements a piece: what torch converts of it to float64 stays in the cache.
CHUNK_ELEMENTS = 1 << 16


def sum_and_least(tensor: torch.Tensor) -> tuple[float, float]:
    """The sum of all entries in float64, and the least of them and 0; both NaN if any entry is.

    tensor: any floating dtype, shape and strides; borrowed. One transfer to the host.
    """

    def add_piece(_: Piece, parts: Tensors, __: Tensors, result: torch.Tensor) -> None:
        part = parts[0].to(result.device)
        result[0] += part.sum(dtype=torch.float64)
        result[1] = torch.minimum(result[1], part.min())

    results = stream(add_piece, [tensor], CHUNK_ELEMENTS, sums=(2,))
    total, least = torch.stack([results[:, 0].sum(), results[:, 1].min()]).tolist()
    return total, least
