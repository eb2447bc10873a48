"""Which unit of a model belongs to which unit of the reference: an exact assignment.

The assignment has the greatest sum of inner products of the units that it pairs, which is the
least sum of their squared distances. Distances over a part of the columns can only be too small:
where they prove the nearest unit of each, the table of all pairs is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from mergekit_karcher.align.orders import UnitOrder, is_better

# Elements that are copied to float64 at once, of both sides together.
_CHUNK_ELEMENTS = 1 << 22
# Elements of differences that are computed at once.
_SMALL_CHUNK = 1 << 19
# Units of the reference whose distances to all of the model's are computed at once.
_BOUND_ROWS = 1024
# Shares of the columns that are tried, one after the other, before the table of all pairs.
_SHARES = (1 / 32, 1 / 8)
# How much float32 may round, relative to the squares that are summed.
_MARGIN = 1e-5
# Squares of float32 below this lose their digits.
_UNDERFLOW = 1e-30

# Of a model: matrices (n, d_m), m = 0, 1, ..., whose rows are the same n units; borrowed.
Units = Sequence[torch.Tensor]
_Table = NDArray[np.float64]


def assign(reference: Units, model: Units) -> UnitOrder:
    """The order p of a model's units that maximises sum_a <reference_a, model_p(a)> exactly.

    Computed in float64, whatever the dtypes. Needs n^2 float64 values only where distances over a
    part of the columns do not decide. Raises `ValueError` if the inner products are not finite.
    """
    if len(reference[0]) == 1:
        return np.zeros(1, np.intp)
    for share in _SHARES:
        candidates = _nearest_if_proven(reference, model, share)
        if candidates is not None:
            return candidates
    return best_order(benefits(reference, model))


def best_order(table: _Table) -> UnitOrder:
    """The order with the greatest sum of table[i, j], the benefit of unit j at place i.

    The table is overwritten. Raises `ValueError` if it is not finite.
    """
    order: UnitOrder = linear_sum_assignment(np.negative(table, out=table))[1]
    return order


def order_if_better(table: _Table) -> UnitOrder | None:
    """As `best_order`, with the table borrowed; None if every unit may stay where it is."""
    order = best_order(table.copy())
    reached = float(table[np.arange(len(order)), order].sum())
    return order if is_better(reached, float(np.trace(table))) else None


def benefits(reference: Units, model: Units) -> _Table:
    """The inner products (n, n) of every unit of the reference with every unit of the model."""
    count = len(reference[0])
    table = torch.zeros(count, count, dtype=torch.float64)
    for left, right in _in_float64(reference, model):
        table.addmm_(left, right.T)
    result: _Table = table.numpy()
    return result


def inner_product(reference: Units, model: Units) -> float:
    """sum_a <reference_a, model_a> over all units, as they stand, in float64."""
    by_unit = torch.zeros(len(reference[0]), dtype=torch.float64)
    for left, right in _in_float64(reference, model):
        by_unit += left.mul_(right).sum(1)
    return float(by_unit.sum())


def _in_float64(reference: Units, model: Units) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Columns of both sides in float64, a part at a time, always in the same two buffers.

    New buffers each time would be of a size that the allocator keeps: some hundred MB in the end.
    """
    count = max(1, len(reference[0]))
    widest = max(tensor.shape[1] for tensor in reference)
    step = max(1, min(widest, _CHUNK_ELEMENTS // (2 * count)))
    buffers = torch.empty(2, count * step, dtype=torch.float64)
    for pair in zip(reference, model, strict=True):
        for start in range(0, pair[0].shape[1], step):
            parts = [tensor[:, start : start + step] for tensor in pair]
            left, right = (
                buffer[: part.numel()].view(part.shape).copy_(part)
                for buffer, part in zip(buffers, parts, strict=True)
            )
            yield left, right


def squared_distances(reference: Units, model: Units, order: torch.Tensor) -> torch.Tensor:
    """|reference_a - model_order(a)|^2 of every unit, (n,) float64.

    Upper bounds: above the true values, by no more than float32 may round.
    """
    # Differences of 16-bit values are exact in float32.
    dtype = torch.float64 if reference[0].dtype == torch.float64 else torch.float32
    total = torch.zeros(len(order), dtype=torch.float64)
    step = max(1, _SMALL_CHUNK // reference[0].shape[1])
    for left, right in zip(reference, model, strict=True):
        for start in range(0, len(order), step):
            rows = slice(start, start + step)
            gap = left[rows].to(dtype) - right[order[rows]].to(dtype)
            total[rows] += torch.linalg.vector_norm(gap, dim=1).double().square()
    return total.mul_(1 + _MARGIN).add_(_UNDERFLOW)


def first_columns(matrices: Units, share: float) -> torch.Tensor:
    """A share of the columns of every matrix, at least one, side by side: (n, columns) float32."""
    columns = (max(1, round(matrix.shape[1] * share)) for matrix in matrices)
    return torch.cat([m[:, :count].float() for m, count in zip(matrices, columns, strict=True)], 1)


def least_distances(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """|left_i - right_j|^2 for the rows of two float32 matrices.

    Lower bounds: less more than float32 may round, so that they may be negative.
    """
    squares = [side.square().sum(1) * (1 - _MARGIN) for side in (left, right)]
    table = torch.addmm(squares[1], left, right.T, alpha=-2)
    return table.add_(squares[0][:, None])


def _nearest_if_proven(reference: Units, model: Units, share: float) -> UnitOrder | None:
    """The nearest unit of the model for each of the reference, if a share of the columns proves it.

    None if two units have the same nearest, or another one may be as near as the candidate.
    """
    parts = [first_columns(side, share) for side in (reference, model)]
    if parts[0].shape[1] * 2 > sum(matrix.shape[1] for matrix in reference):
        return None
    count = len(reference[0])
    candidates = torch.empty(count, dtype=torch.long)
    second = torch.empty(count, dtype=torch.float64)
    for start in range(0, count, _BOUND_ROWS):
        rows = slice(start, start + _BOUND_ROWS)
        least = least_distances(parts[0][rows], parts[1]).topk(2, 1, largest=False)
        candidates[rows], second[rows] = least.indices[:, 0], least.values[:, 1]
    if len(torch.unique(candidates)) < count:
        return None
    proven = bool((squared_distances(reference, model, candidates) < second).all())
    return candidates.numpy().astype(np.intp) if proven else None
