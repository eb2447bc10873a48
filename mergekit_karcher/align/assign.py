"""Which unit of a model belongs to which of the reference: an exact assignment.

The inner products of all pairs of units are the benefits. That is the same as to minimise the sum
of squared distances, and where one model is nearly the other in another order, these save most of
the work: over some columns alone, and the rest's lengths, they can only be too small, and if every
unit is nearer to its candidate than to any other even so, the candidates are the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Indices = NDArray[np.intp]

# Columns that are widened to float64 at once, of both sides together with all their rows.
_CHUNK_ELEMENTS = 1 << 22
# Rows of benefits that the bound is tested on at once.
_BOUND_ROWS = 1024
# Shares of the columns that the bound is tried with.
_SHARES = (1 / 32, 1 / 8)
# What float32 may round, relative to the squares that are summed.
_MARGIN = 1e-5


def assign(reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor]) -> Indices:
    """The order of the model's units that is nearest to the reference: unit p[a] for place a.

    reference, model: matrices (n, d_m) of the same n units, pair by pair of one shape; any floating
    dtypes, borrowed. Maximises sum_a <reference_a, model_p(a)>, in float64, exactly.
    Memory: n^2 float64 values where the bound does not decide, and chunks of the matrices.
    """
    count = reference[0].shape[0]
    if count == 1:
        return np.zeros(1, np.intp)
    for share in _SHARES:
        found = _by_bound(reference, model, share)
        if found is not None:
            return found
    return best_order(benefits(reference, model))


def best_order(table: NDArray[np.float64]) -> Indices:
    """The assignment of greatest total benefit; the table is overwritten."""
    rows, columns = linear_sum_assignment(np.negative(table, out=table))
    assert (np.diff(rows) == 1).all()
    order: Indices = columns
    return order


def benefits(
    reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor]
) -> NDArray[np.float64]:
    """Inner products of every unit of the reference with every unit of the model, in float64."""
    count = reference[0].shape[0]
    table = torch.zeros(count, count, dtype=torch.float64)
    step = max(1, _CHUNK_ELEMENTS // (2 * count))
    for left, right in zip(reference, model, strict=True):
        for start in range(0, left.shape[1], step):
            columns = slice(start, start + step)
            table.addmm_(left[:, columns].double(), right[:, columns].double().T)
    result: NDArray[np.float64] = table.numpy()
    return result


def along(reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor]) -> torch.Tensor:
    """<reference_a, model_a> for every unit, in float64."""
    return _summed(reference, model, lambda left, right: left * right)


def squared_distances(
    reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor]
) -> torch.Tensor:
    """|reference_a - model_a|^2 for every unit, in float64."""
    return _summed(reference, model, lambda left, right: (left - right).square_())


def least_distances(left: torch.Tensor, right: torch.Tensor, used: int) -> torch.Tensor:
    """For every two rows a number that their squared distance is not below, in float32.

    used: how many columns are looked at; of the others only the lengths are.
    """
    heads = [side[:, :used].float() for side in (left, right)]
    squares = [head.square().sum(1) for head in heads]
    rest = [
        _summed([side[:, used:]], [side[:, used:]], torch.mul).sqrt().float()
        for side in (left, right)
    ]
    table = torch.addmm(squares[1], heads[0], heads[1].T, alpha=-2)
    table += squares[0][:, None]
    table += (rest[0][:, None] - rest[1]).square_()
    # Less by more than float32 rounds.
    sizes = [(square + own.square()) for square, own in zip(squares, rest, strict=True)]
    return table.sub_((sizes[0][:, None] + sizes[1]).mul_(_MARGIN))


def _by_bound(
    reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor], share: float
) -> Indices | None:
    sizes = [max(1, round(left.shape[1] * share)) for left in reference]
    if sum(sizes) * 2 > sum(left.shape[1] for left in reference):
        return None
    count = len(reference[0])
    candidates = torch.empty(count, dtype=torch.long)
    nearest = torch.empty(count, dtype=torch.float64)
    for start in range(0, count, _BOUND_ROWS):
        rows = slice(start, start + _BOUND_ROWS)
        table = sum(
            least_distances(left[rows], right, size)
            for left, right, size in zip(reference, model, sizes, strict=True)
        )
        assert isinstance(table, torch.Tensor)
        own = table.argmin(1)
        candidates[rows] = own
        table.scatter_(1, own[:, None], torch.inf)
        nearest[rows] = table.amin(1).double()
    if len(torch.unique(candidates)) < count:
        return None
    distances = squared_distances(reference, [tensor[candidates] for tensor in model])
    decided = bool((distances < nearest).all())
    return candidates.numpy().astype(np.intp) if decided else None


def _summed(
    reference: Sequence[torch.Tensor],
    model: Sequence[torch.Tensor],
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    total = torch.zeros(reference[0].shape[0], dtype=torch.float64)
    step = max(1, _CHUNK_ELEMENTS // (2 * max(1, len(total))))
    for left, right in zip(reference, model, strict=True):
        for start in range(0, left.shape[1], step):
            columns = slice(start, start + step)
            total += combine(left[:, columns].double(), right[:, columns].double()).sum(1)
    return total
