"""Input Grams in factors: a factor of low rank, and the diagonal of the rest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Wider Grams are stored in factors, of a quarter of their width: 4096 wide, one is 64 MB.
DENSE_WIDTH = 4096
SHARE_OF_RANK = 4


class Factors(NamedTuple):
    """A = F' F + diag(d): F is (rank, in), d is (in,), or both with an axis of experts before."""

    factor: Tensor
    diagonal: Tensor


def factored(gram: Tensor, rank: int) -> Factors:
    """An input Gram in factors, by Nystroem's method on an orthonormal sketch of its range.

    With Q spanning the range of A G, G of Gaussian numbers, F' F = A Q (Q' A Q)^-1 Q' A is never
    more than A (Halko, Martinsson & Tropp 2011, section 5.4), so what is left has a diagonal that
    is not negative; it is kept, and the rest of it is dropped. At full rank nothing is dropped.

    Arguments:
        gram: (in, in) or (experts, in, in), symmetric, positive semidefinite, of any float dtype.
        rank: Of F; at most in.

    Returns:
        New tensors of the dtype and on the device of gram. The same gram gives the same factors;
        the work is done in float64.
    """
    if gram.ndim == 3:
        parts = [factored(expert, rank) for expert in gram]
        return Factors(*(torch.stack(of_experts) for of_experts in zip(*parts, strict=True)))
    matrix, width = gram.double(), len(gram)
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(width, rank, generator=generator, dtype=torch.float64).to(gram.device)
    basis = torch.linalg.qr(matrix @ sketch).Q
    image = matrix @ basis
    values, vectors = torch.linalg.eigh(basis.T @ image)
    least = values.max().clamp_min(0) * rank * torch.finfo(torch.float64).eps
    scale = torch.where(values > least, values, torch.inf).rsqrt()
    factor = scale[:, None] * (vectors.T @ image.T)
    rest = (matrix.diagonal() - factor.square().sum(0)).clamp_min(0)
    return Factors(factor.to(gram.dtype), rest.to(gram.dtype))
