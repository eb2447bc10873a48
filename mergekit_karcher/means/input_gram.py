"""`InputGram`: the metric of a linear layer, the second moments of its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mergekit_karcher.errors import KarcherError


@dataclass(frozen=True, eq=False)
class InputGram:
    """What a change of a linear layer's weight costs a model.

    Moving W, (out, in), by E moves the layer's output for an input x by E x. Over the inputs that a
    model sees, the mean of |E x|^2 is tr(E A E') with A = E[x x'], the input Gram (Jin et al. 2023,
    *Dataless Knowledge Fusion*, section 3.1). It is given either as it is, or in factors:
    A = F' F + diag(d).

    Arguments:
        dense: A, (in, in), or (experts, in, in) for a stack of experts; symmetric and positive
            semidefinite.
        factor: F, (rank, in) or (experts, rank, in).
        diagonal: d, (in,) or (experts, in), not negative; zero if it is None.

    All are floating, finite, of any dtype, and borrowed.

    Raises:
        KarcherError: Unless there is either a dense matrix or a factor, of such a shape.
    """

    dense: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    diagonal: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if (self.dense is None) is (self.factor is None):
            raise KarcherError("An input Gram is either dense or has a factor: give one of them.")
        if self.dense is not None and self.diagonal is not None:
            raise KarcherError("A dense input Gram has its diagonal in it: give no other.")
        shape = tuple(self.matrix.shape)
        square = self.dense is None or shape[-2:] == (shape[-1], shape[-1])
        if len(shape) not in (2, 3) or not square:
            raise KarcherError(
                f"An input Gram of shape {shape} is none: give (in, in) for a layer, or "
                "(experts, in, in) for experts, and of factors (rank, in)."
            )
        expected = (*shape[:-2], shape[-1])
        if self.diagonal is not None and tuple(self.diagonal.shape) != expected:
            raise KarcherError(
                f"The diagonal of an input Gram has shape {tuple(self.diagonal.shape)}, but its "
                f"factor needs {expected}."
            )

    @property
    def matrix(self) -> torch.Tensor:
        """The dense matrix, or else the factor."""
        return next(part for part in (self.dense, self.factor) if part is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """(in, in), or (experts, in, in)."""
        *experts, _, inputs = self.matrix.shape
        return (*experts, inputs, inputs)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.matrix.device

    def to(self, *target: Any) -> InputGram:
        """The same on another device or in another dtype."""
        parts = (self.dense, self.factor, self.diagonal)
        return InputGram(*(None if part is None else part.to(*target) for part in parts))

    def expert(self, index: int) -> InputGram:
        """That of one expert of a stack, as views."""
        parts = (self.dense, self.factor, self.diagonal)
        return InputGram(*(None if part is None else part[index] for part in parts))

    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor infinity."""
        parts = (self.dense, self.factor, self.diagonal)
        return all(bool(part.isfinite().all()) for part in parts if part is not None)

    def trace(self) -> float:
        """tr A, in float64, summed over experts."""
        if self.dense is not None:
            return float(self.dense.diagonal(dim1=-2, dim2=-1).double().sum())
        diagonal = 0.0 if self.diagonal is None else float(self.diagonal.double().sum())
        return diagonal + float(self.matrix.double().square().sum())

    def add_to(self, total: torch.Tensor, weight: float) -> None:
        """total += weight A, in the dtype of total, (in, in); for one layer."""
        if self.dense is not None:
            total.add_(self.dense.to(total.dtype), alpha=weight)
            return
        factor = self.matrix.to(total.dtype)
        total.addmm_(factor.T, factor, alpha=weight)
        if self.diagonal is not None:
            total.diagonal().add_(self.diagonal.to(total.dtype), alpha=weight)

    def applied_to(self, rows: torch.Tensor) -> torch.Tensor:
        """rows A for rows of shape (out, in), in their dtype; for one layer."""
        if self.dense is not None:
            return rows @ self.dense.to(rows.dtype)
        factor = self.matrix.to(rows.dtype)
        result = (rows @ factor.T) @ factor
        if self.diagonal is not None:
            result.addcmul_(rows, self.diagonal.to(rows.dtype))
        return result
