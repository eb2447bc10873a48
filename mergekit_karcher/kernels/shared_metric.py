"""The diagonal metric that several models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


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
