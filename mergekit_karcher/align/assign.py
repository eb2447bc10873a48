"""Which unit of a model belongs to which of the reference: an exact assignment.

The inner products of all pairs of units are the benefits. That is the same as to minimise the sum
of squared distances, and where one model is nearly the other in another order, these save most of
the work: over some columns alone they can only be too small, and if every unit is nearer to its
candidate, over all columns, than to any other even so, the candidates are the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Indices = NDArray[np.intp]

# Columns that are widened to float64 at once, of both sides together with all their rows.
_CHUNK_ELEMENTS = 1 << 22
# Elements of differences that are made at once.
_SMALL_CHUNK = 1 << 19
# Rows of benefits that the bound is tested on at once.
_BOUND_ROWS = 1024
# Shares of the columns that the bound is tried with.
_SHARES = (1 / 32, 1 / 8)
# What float32 may round, relative to the squares that are summed.
_MARGIN = 1e-5
# Squares of float32 below this lose their digits.
_UNDERFLOW = 1e-30


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
    count = len(reference[0])
    table = torch.zeros(count, count, dtype=torch.float64)
    for left, right in _widened(reference, model):
        table.addmm_(left, right.T)
    result: NDArray[np.float64] = table.numpy()
    return result


def along(reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor]) -> torch.Tensor:
    """<reference_a, model_a> for every unit, in float64."""
    total = torch.zeros(len(reference[0]), dtype=torch.float64)
    for left, right in _widened(reference, model):
        total += left.mul_(right).sum(1)
    return total


def _widened(
    reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Columns of both sides in float64, a part at a time, always in the same two buffers.

    New ones each time would be of a size that the allocator keeps: some hundred MB after a while.
    """
    count = max(1, len(reference[0]))
    most = max(tensor.shape[1] for tensor in reference)
    step = max(1, min(most, _CHUNK_ELEMENTS // (2 * count)))
    buffers = torch.empty(2, count * step, dtype=torch.float64)
    for pair in zip(reference, model, strict=True):
        for start in range(0, pair[0].shape[1], step):
            parts = [tensor[:, start : start + step] for tensor in pair]
            left, right = (
                buffer[: part.numel()].view(part.shape).copy_(part)
                for buffer, part in zip(buffers, parts, strict=True)
            )
            yield left, right


def squared_distances(
    reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor], order: torch.Tensor
) -> torch.Tensor:
    """|reference_a - model_order(a)|^2 for every unit, with a rounding error of float32 added.

    In float32 but for float64 inputs: differences of 16-bit values are exact in it.
    """
    widest = torch.float64 if reference[0].dtype == torch.float64 else torch.float32
    total = torch.zeros(len(order), dtype=torch.float64)
    step = max(1, _SMALL_CHUNK // reference[0].shape[1])
    for left, right in zip(reference, model, strict=True):
        for start in range(0, len(order), step):
            rows = slice(start, start + step)
            gap = left[rows].to(widest) - right[order[rows]].to(widest)
            total[rows] += torch.linalg.vector_norm(gap, dim=1).double().square()
    return total.mul_(1 + _MARGIN).add_(_UNDERFLOW)


def some_columns(side: Sequence[torch.Tensor], share: float) -> torch.Tensor:
    """The first columns of each matrix, in float32, as one."""
    sizes = [max(1, round(tensor.shape[1] * share)) for tensor in side]
    return torch.cat([t[:, :size].float() for t, size in zip(side, sizes, strict=True)], 1)


def least_distances(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Squared distances of all rows of two float32 matrices, less by more than is rounded."""
    squares = [side.square().sum(1) * (1 - _MARGIN) for side in (left, right)]
    table = torch.addmm(squares[1], left, right.T, alpha=-2)
    return table.add_(squares[0][:, None])


def _by_bound(
    reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor], share: float
) -> Indices | None:
    heads = [some_columns(side, share) for side in (reference, model)]
    if heads[0].shape[1] * 2 > sum(left.shape[1] for left in reference):
        return None
    count = len(reference[0])
    candidates = torch.empty(count, dtype=torch.long)
    nearest = torch.empty(count, dtype=torch.float64)
    for start in range(0, count, _BOUND_ROWS):
        rows = slice(start, start + _BOUND_ROWS)
        least = least_distances(heads[0][rows], heads[1]).topk(2, 1, largest=False)
        candidates[rows], nearest[rows] = least.indices[:, 0], least.values[:, 1].double()
    if len(torch.unique(candidates)) < count:
        return None
    distances = squared_distances(reference, model, candidates)
    decided = bool((distances < nearest).all())
    return candidates.numpy().astype(np.intp) if decided else None
