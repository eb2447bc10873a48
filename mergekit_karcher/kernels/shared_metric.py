"""The diagonal metric that several models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class SharedMetric(NamedTuple):
    """G = 4^exponent (constant + sum_k weights_k G_k), element by element, of one tensor."""

    tensors: Sequence[torch.Tensor]  # the G_k, any floating dtypes and strides; borrowed
    weights: Sequence[float]
    constant: float
    exponent: int  # keeps the rest of G near one, so that no square of it leaves float64's range

    def roots(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        """Write sqrt(G) / 2^exponent of a piece into float64 out; parts: that piece of each G_k."""
        out.fill_(self.constant)
        for part, weight in zip(parts, self.weights, strict=True):
            out.add_(part.to(out.device), alpha=weight)
        return out.sqrt_()

    def dense(self, like: torch.Tensor) -> torch.Tensor:
        """G / 4^exponent, a new float64 tensor of the shape and on the device of like."""
        roots = self.roots(self.tensors, like.new_empty(like.shape, dtype=torch.float64))
        return roots.square_()
