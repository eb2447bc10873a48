"""Orders of a model's tensors: which index comes to each place along the axes that are permuted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_karcher.align.symmetry import Move, Symmetry

# Reads a tensor of a model by its name; the tensor is borrowed.
Reader = Callable[[str], torch.Tensor]
# The index that comes to each place, by (tensor, axis). What is not listed stays as it is.
Orders = dict[tuple[str, int], torch.Tensor]
# For each unit, the row of the unit's block that comes to each place in it: (units, block).
BlockOrders = NDArray[np.intp]
# The unit that comes to each place: (units,).
UnitOrder = NDArray[np.intp]

# A new order must be better than the old one by more than this, relative to the larger of both:
# less is rounding.
_IMPROVEMENT = 1e-12


def arranged(tensor: torch.Tensor, name: str, orders: Orders) -> torch.Tensor:
    """The tensor of that name with its axes in order; the given one if none of them is permuted."""
    for axis in range(tensor.ndim):
        if (name, axis) in orders:
            tensor = tensor.index_select(axis, orders[name, axis])
    return tensor


def is_better(new: float, old: float) -> bool:
    """Whether an inner product is greater than another one by more than rounding."""
    return new > old + max(abs(new), abs(old)) * _IMPROVEMENT


def stopped_falling(new: float, old: float) -> bool:
    """Whether a spread is not smaller than another one by more than rounding."""
    return new > old * (1 - _IMPROVEMENT)


def is_identity(order: UnitOrder | BlockOrders) -> bool:
    """Whether everything stays where it is."""
    return bool((order == np.arange(order.shape[-1])).all())


def unmoved_blocks(symmetry: Symmetry) -> list[BlockOrders]:
    """For each move of a symmetry, the order that leaves every unit's block as it is."""
    return [np.tile(np.arange(move.block), (symmetry.size, 1)) for move in symmetry.moves]


def blocks_of(tensor: torch.Tensor, move: Move, size: int) -> torch.Tensor:
    """The units of a move, (size, block, rest); a view of the tensor where strides allow one.

    For each unit the rows of its block, everything but the axis of the move flattened.
    """
    part = tensor.narrow(move.axis, move.offset, size * move.block).movedim(move.axis, 0)
    return part.reshape(size, move.block, -1)


def orders_of_units(
    symmetry: Symmetry, order: UnitOrder, in_blocks: Sequence[BlockOrders], model: Reader
) -> Orders:
    """The orders of all axes that put the units of a symmetry into an order.

    in_blocks: for each move, at each place the order inside the unit that comes there.
    model: is read for the lengths of the axes alone.
    """
    orders: Orders = {}
    for move, in_block in zip(symmetry.moves, in_blocks, strict=True):
        key = (move.tensor, move.axis)
        if key not in orders:
            orders[key] = torch.arange(model(move.tensor).shape[move.axis])
        indices = move.offset + order[:, None] * move.block + in_block
        end = move.offset + symmetry.size * move.block
        orders[key][move.offset : end] = torch.from_numpy(indices.ravel())
    return orders


def follow_with(orders: Orders, more: Mapping[tuple[str, int], torch.Tensor]) -> None:
    """Change orders, in place, to what they and then more do to a model."""
    for key, order in more.items():
        orders[key] = orders[key][order] if key in orders else order


def random_orders(symmetries: Sequence[Symmetry], model: Reader, seed: int) -> Orders:
    """Orders that put the units of all symmetries, and what is inside of each, at random places.

    model: is read for the lengths of the axes alone.
    """
    generator = np.random.default_rng(seed)
    orders: Orders = {}
    for symmetry in symmetries:
        in_blocks = unmoved_blocks(symmetry)
        for unit in range(symmetry.size):
            for inside in symmetry.inside:
                permutation = generator.permutation(inside.size)
                for move in inside.moves:
                    rows = slice(move.offset, move.offset + inside.size * move.block)
                    part = in_blocks[move.move][unit]
                    part[rows] = part[rows].reshape(inside.size, -1)[permutation].ravel()
        order = generator.permutation(symmetry.size)
        follow_with(orders, orders_of_units(symmetry, order, in_blocks, model))
    return orders
