"""Diagonal metrics: their sums, and the one that several models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mergekit_karcher.kernels.chunks import Piece, walk, working_device
from mergekit_karcher.kernels.workers import in_stripes, worker_count

# Elements a piece: a few float64 buffers of that size stay in the cache.
CHUNK_ELEMENTS = 1 << 16


class SharedMetric(NamedTuple):
    """G = 4^exponent (constant + sum_k weights_k G_k), element by element, of one tensor.

    tensors: the G_k, of the tensor's shape and device, any floating dtypes and strides; borrowed.
    exponent: keeps what is left of G near one, so that no square of it leaves float64's range.
    """

    tensors: Sequence[torch.Tensor]
    weights: Sequence[float]
    constant: float
    exponent: int

    def rows(self, here: slice) -> SharedMetric:
        """The same of some of the tensor's rows."""
        return self._replace(tensors=[tensor[here] for tensor in self.tensors])

    def roots(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        """sqrt(G) / 2^exponent of a piece; parts: the pieces of the tensors. out: float64."""
        out.fill_(self.constant)
        for part, weight in zip(parts, self.weights, strict=True):
            out.add_(part.to(out.device), alpha=weight)
        return out.sqrt_()

    def dense(self, like: torch.Tensor) -> torch.Tensor:
        """G / 4^exponent, as a new float64 tensor of the shape of like."""
        roots = self.roots(self.tensors, like.new_empty(like.shape, dtype=torch.float64))
        return roots.square_()


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
