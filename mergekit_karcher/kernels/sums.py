"""The sum of a tensor, and its least entry."""

from __future__ import annotations

import torch

from mergekit_karcher.kernels.chunks import Piece
from mergekit_karcher.kernels.streaming import Tensors, stream

# Elements a piece: what torch converts of it to float64 stays in the cache.
CHUNK_ELEMENTS = 1 << 16


def sum_and_least(tensor: torch.Tensor) -> tuple[float, float]:
    """The sum of all entries of a tensor, and the least of them and 0.

    Scratch: at most CHUNK_ELEMENTS values for each thread. One transfer to the host.

    Arguments:
        tensor: Any floating dtype, shape and strides. Borrowed.

    Returns:
        The sum, in float64, and the least entry or 0, whichever is less. Both are NaN if any entry
        is.
    """

    def add_piece(_: Piece, parts: Tensors, __: Tensors, result: torch.Tensor) -> None:
        part = parts[0].to(result.device)
        result[0] += part.sum(dtype=torch.float64)
        result[1] = torch.minimum(result[1], part.min())

    results = stream(add_piece, [tensor], CHUNK_ELEMENTS, sums=(2,))
    total, least = torch.stack([results[:, 0].sum(), results[:, 1].min()]).tolist()
    return total, least
