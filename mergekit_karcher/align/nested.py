"""Units that have symmetries of their own inside, such as attention heads.

Models come as blocks, one tensor (size, block, rest) for each move, see `orders.blocks_of`;
borrowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mergekit_karcher.align.assign import (
    benefits,
    best_order,
    first_columns,
    inner_product,
    least_distances,
    order_if_better,
    squared_distances,
)
from mergekit_karcher.align.orders import BlockOrders, UnitOrder
from mergekit_karcher.align.symmetry import Inside, Symmetry

# The share of the columns over which distances are bounded.
_BOUND_SHARE = 1 / 8
_MOST_SWEEPS = 100

_Blocks = Sequence[torch.Tensor]


def best_nested_order(
    symmetry: Symmetry, reference: _Blocks, model: _Blocks
) -> tuple[UnitOrder, list[BlockOrders]]:
    """The best order of units, each compared with each at the best order inside of it.

    Returns the unit at each place, and for each move the order inside that unit. Raises
    `ValueError` if the inner products are not finite.
    """
    size = symmetry.size
    table = np.empty((size, size))
    in_blocks = [np.empty((size, size, move.block), np.intp) for move in symmetry.moves]
    for place in range(size):
        left = [blocks[place].double() for blocks in reference]
        for unit in range(size):
            right = [blocks[unit].double() for blocks in model]
            table[place, unit], orders = _best_inside(symmetry.inside, left, right)
            for in_block, order in zip(in_blocks, orders, strict=True):
                in_block[place, unit] = order
    order = best_order(table)
    return order, [in_block[np.arange(size), order] for in_block in in_blocks]


def _best_inside(
    insides: Sequence[Inside], reference: _Blocks, model: _Blocks
) -> tuple[float, list[BlockOrders]]:
    """The inner product of two units at the best orders inside, found in turns, and the orders."""
    orders = [torch.arange(len(block)) for block in reference]
    for _ in range(_MOST_SWEEPS):
        changed = [_reorder(inside, reference, model, orders) for inside in insides]
        if not any(changed) or len(insides) == 1:
            break
    reached = sum(
        inner_product([left.flatten(1)], [right[order].flatten(1)])
        for left, right, order in zip(reference, model, orders, strict=True)
    )
    return reached, [order.numpy() for order in orders]


def _reorder(
    inside: Inside, reference: _Blocks, model: _Blocks, orders: list[torch.Tensor]
) -> bool:
    """Put one symmetry inside two units into its best order, if that is better; orders change."""
    left, right = [], []
    for index, offset, block in inside.moves:
        rows = slice(offset, offset + inside.size * block)
        left.append(reference[index][rows].reshape(inside.size, -1))
        right.append(model[index][orders[index]][rows].reshape(inside.size, -1))
    order = order_if_better(benefits(left, right))
    if order is None:
        return False
    for index, offset, block in inside.moves:
        step = np.arange(len(orders[index]))
        indices = offset + order[:, None] * block + np.arange(block)
        step[offset : offset + inside.size * block] = indices.ravel()
        orders[index] = orders[index][torch.from_numpy(step)]
    return True


def is_proven_best(symmetry: Symmetry, reference: _Blocks, model: _Blocks) -> bool:
    """Whether it is proven, at little cost, that no other order of units or inside them is better.

    Wherever a unit goes, and in whatever order inside, none of its rows can get nearer to the
    reference than to the nearest row of the unit there. `assign.least_distances` bounds those
    distances from below.
    """
    size = symmetry.size
    elsewhere = torch.zeros(size, size, dtype=torch.float64)
    stay = torch.zeros(size, dtype=torch.float64)
    for rows, indices in _moves_permuted_alike(symmetry):
        left, right = (
            [side[index].reshape(size * rows, -1) for index in indices]
            for side in (reference, model)
        )
        table = least_distances(*(first_columns(side, _BOUND_SHARE) for side in (left, right)))
        table = table.view(size, rows, size, rows)
        exact = squared_distances(left, right, torch.arange(size * rows)).view(size, rows)
        in_unit = table[torch.arange(size), :, torch.arange(size)].clone()
        in_unit.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        if rows > 1 and not bool((exact < in_unit.amin(2)).all()):
            return False
        elsewhere += table.amin(3).clamp_(min=0).sum(1).double()
        stay += exact.sum(1)
    elsewhere.fill_diagonal_(torch.inf)
    return bool((stay < elsewhere.amin(1)).all())


def _moves_permuted_alike(symmetry: Symmetry) -> list[tuple[int, list[int]]]:
    """The moves in groups whose blocks have one order inside, with how many rows it permutes."""
    groups: dict[tuple[int, tuple[tuple[int, int, int], ...]], list[int]] = {}
    for index, move in enumerate(symmetry.moves):
        inner = tuple(
            (place, offset, block)
            for place, inside in enumerate(symmetry.inside)
            for inner_index, offset, block in inside.moves
            if inner_index == index
        )
        rows = move.block // min(block for _, _, block in inner) if inner else 1
        groups.setdefault((rows, inner), []).append(index)
    return [(rows, indices) for (rows, _), indices in groups.items()]
