"""Which unit of a model belongs to which unit of the reference: an exact assignment.

The assignment has the greatest sum of inner products of the units that it pairs, which is the
least sum of their squared distances. Distances save most of the work where a model is nearly the
reference with its units in another order: over a part of the columns a distance can only be too
small. So if every unit is nearer to one candidate, over all columns, than the part says it can be
to any other, the candidates are the answer, and the table of all pairs is not needed.
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


def assign(reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor]) -> UnitOrder:
    """The order of a model's units that is nearest to the reference.

    Arguments:
        reference, model: Matrices (n, d_m) whose rows are the same n units, pair by pair of one
            shape; any floating dtypes; borrowed.

    Returns:
        (n,) p, with unit p[a] at place a, that maximises sum_a <reference_a, model_p(a)> exactly,
        in float64. Scratch memory: chunks of the matrices, and n^2 float64 values where distances
        over a part of the columns do not decide.

    Raises:
        ValueError: If the inner products are not finite.
    """
    if reference[0].shape[0] == 1:
        return np.zeros(1, np.intp)
    for share in _SHARES:
        candidates = _nearest_if_proven(reference, model, share)
        if candidates is not None:
            return candidates
    return best_order(benefits(reference, model))


def best_order(table: NDArray[np.float64]) -> UnitOrder:
    """The assignment with the greatest total benefit.

    Arguments:
        table: (n, n) the benefit of unit j at place i; overwritten.

    Returns:
        (n,) the unit at each place.

    Raises:
        ValueError: If the table is not finite.
    """
    order: UnitOrder = linear_sum_assignment(np.negative(table, out=table))[1]
    return order


def order_if_better(table: NDArray[np.float64]) -> UnitOrder | None:
    """The assignment with the greatest total benefit, if it is better than to move nothing.

    Arguments:
        table: (n, n) the benefit of unit j at place i; borrowed.

    Returns:
        (n,) the unit at each place; None if every unit may stay.

    Raises:
        ValueError: If the table is not finite.
    """
    order = best_order(table.copy())
    reached = float(table[np.arange(len(order)), order].sum())
    return order if is_better(reached, float(np.trace(table))) else None


def benefits(
    reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor]
) -> NDArray[np.float64]:
    """The inner products of every unit of the reference with every unit of the model.

    Arguments:
        reference, model: As those of `assign`.

    Returns:
        (n, n) float64, units of the reference first.
    """
    count = len(reference[0])
    table = torch.zeros(count, count, dtype=torch.float64)
    for left, right in _in_float64(reference, model):
        table.addmm_(left, right.T)
    result: NDArray[np.float64] = table.numpy()
    return result


def inner_product(reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor]) -> float:
    """sum_a <reference_a, model_a> over all units, as they stand.

    Arguments:
        reference, model: As those of `assign`.

    Returns:
        The sum, computed in float64.
    """
    by_unit = torch.zeros(len(reference[0]), dtype=torch.float64)
    for left, right in _in_float64(reference, model):
        by_unit += left.mul_(right).sum(1)
    return float(by_unit.sum())


def _in_float64(
    reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
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


def squared_distances(
    reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor], order: torch.Tensor
) -> torch.Tensor:
    """Upper bounds of |reference_a - model_order(a)|^2 for every unit.

    Arguments:
        reference, model: As those of `assign`.
        order: (n,) the unit of the model to compare with each of the reference.

    Returns:
        (n,) float64, above the true values by no more than float32 may round.
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


def first_columns(matrices: Sequence[torch.Tensor], share: float) -> torch.Tensor:
    """A share of the columns of every matrix, at least one of each, side by side.

    Arguments:
        matrices: (n, d_m) each; borrowed.
        share: Between 0 and 1.

    Returns:
        (n, columns) float32; a copy.
    """
    sizes = [max(1, round(matrix.shape[1] * share)) for matrix in matrices]
    return torch.cat([m[:, :size].float() for m, size in zip(matrices, sizes, strict=True)], 1)


def least_distances(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Lower bounds of the squared distances between the rows of two matrices.

    Arguments:
        left, right: (n, d) and (m, d) float32; borrowed.

    Returns:
        (n, m) float32, |left_i - right_j|^2 less more than float32 may round; may be negative.
    """
    squares = [side.square().sum(1) * (1 - _MARGIN) for side in (left, right)]
    table = torch.addmm(squares[1], left, right.T, alpha=-2)
    return table.add_(squares[0][:, None])


def _nearest_if_proven(
    reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor], share: float
) -> UnitOrder | None:
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
        candidates[rows], second[rows] = least.indices[:, 0], least.values[:, 1].double()
    if len(torch.unique(candidates)) < count:
        return None
    proven = bool((squared_distances(reference, model, candidates) < second).all())
    return candidates.numpy().astype(np.intp) if proven else None
