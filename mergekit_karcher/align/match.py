"""Match the units of models to those of a reference model.

Symmetries that permute axes of one tensor depend on each other: they form a component, and are
matched one after the other, again and again, until no order changes (coordinate descent). Each
match is an exact assignment, given the orders of the rest. Tensors are read when they are needed
and not kept. A value that is not finite raises `KarcherError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mergekit_karcher.align.assign import assign, benefits, inner_product, order_if_better
from mergekit_karcher.align.nested import best_nested_order, is_proven_best
from mergekit_karcher.align.orders import (
    BlockOrders,
    Orders,
    Reader,
    UnitOrder,
    arranged,
    blocks_of,
    follow_with,
    is_better,
    is_identity,
    orders_of_units,
    random_orders,
    unmoved_blocks,
)
from mergekit_karcher.align.symmetry import Move, Specification, Symmetry, components_of
from mergekit_karcher.errors import KarcherError

# A symmetry of more tensors than this (the residual stream) is matched one tensor at a time.
_MOST_TENSORS = 16
# Elements of units that are put into another order at once.
_CHUNK_ELEMENTS = 1 << 20
_MOST_SWEEPS = 100

# The blocks of one move in the reference and in the model, each (size, block, rest).
_Pair = tuple[torch.Tensor, torch.Tensor]


def align_to_reference(
    specification: Specification,
    reference: int,
    models: Sequence[Reader],
    starts: int,
    seed: int,
    advance: Callable[[str], None],
) -> list[Orders]:
    """Find the orders that bring every model nearest to the one with the index reference.

    starts, seed: see `nearest_orders`. advance: called with the name of each component before it
    is matched. The orders of the reference are empty.
    """
    orders: list[Orders] = [{} for _ in models]
    for component in components_of(specification.symmetries):
        advance(component[0].name)
        for index, model in enumerate(models):
            if index != reference:
                orders[index] |= nearest_orders(component, models[reference], model, starts, seed)
    return orders


def nearest_orders(
    component: Sequence[Symmetry], reference: Reader, model: Reader, starts: int, seed: int
) -> Orders:
    """The best orders of several descents: one from the model as it is, others from random orders.

    A single symmetry needs one descent, which is exact.
    """
    best: Orders = {}
    greatest = -np.inf
    for start in range(starts if len(component) > 1 else 1):
        orders = random_orders(component, model, seed + start) if start else {}
        descend(component, reference, model, orders, seed + start)
        if len(component) == 1:
            return orders
        reached = sum(
            _flat_product(reference(name), arranged(model(name), name, orders))
            for name in tensors_of(component)
        )
        if start == 0 or is_better(reached, greatest):
            best, greatest = orders, reached
    return best


def descend(
    component: Sequence[Symmetry], reference: Reader, model: Reader, orders: Orders, seed: int
) -> bool:
    """Match the symmetries of a component in turns, in a random sequence, until none moves.

    orders: those of the model to start from; changed to those that are found. Returns whether any
    order changed.
    """
    generator = np.random.default_rng(seed)
    moved = False
    for _ in range(_MOST_SWEEPS):
        changed = False
        for place in generator.permutation(len(component)):
            step = _matched(component[place], reference, model, orders)
            follow_with(orders, step)
            changed |= bool(step)
        moved |= changed
        if not changed or len(component) == 1:
            break
    return moved


def tensors_of(component: Sequence[Symmetry]) -> list[str]:
    """The names of all tensors that any of the symmetries moves, sorted."""
    return sorted({move.tensor for symmetry in component for move in symmetry.moves})


def _matched(symmetry: Symmetry, reference: Reader, model: Reader, orders: Orders) -> Orders:
    """What the best order of a symmetry adds to the orders of a model; nothing if it may stay."""

    def pair_of(move: Move) -> _Pair:
        tensor = arranged(model(move.tensor), move.tensor, orders)
        return (
            blocks_of(reference(move.tensor), move, symmetry.size),
            blocks_of(tensor, move, symmetry.size),
        )

    if len(symmetry.moves) > _MOST_TENSORS and not symmetry.inside:
        return _matched_by_tensor(symmetry, pair_of, model)
    pairs = [pair_of(move) for move in symmetry.moves]
    left, right = zip(*pairs, strict=True)
    try:
        if not symmetry.inside:
            order, in_blocks = assign(_flat(left), _flat(right)), unmoved_blocks(symmetry)
        elif is_proven_best(symmetry, left, right):
            return {}
        else:
            order, in_blocks = best_nested_order(symmetry, left, right)
    except ValueError:
        # Values that are not finite have no order. To look for them each time would cost a pass.
        for move, sides in zip(symmetry.moves, pairs, strict=True):
            if not all(bool(torch.isfinite(side).all()) for side in sides):
                raise _not_finite(move.tensor) from None
        raise
    if not _is_gain(order, in_blocks, left, right):
        return {}
    return orders_of_units(symmetry, order, in_blocks, model)


def _is_gain(
    order: UnitOrder,
    in_blocks: Sequence[BlockOrders],
    reference: Sequence[torch.Tensor],
    model: Sequence[torch.Tensor],
) -> bool:
    """Whether the model in a new order is nearer to the reference, by more than rounding."""
    if is_identity(order) and all(map(is_identity, in_blocks)):
        return False
    stay = inner_product(_flat(reference), _flat(model))
    units = torch.from_numpy(order)
    new = 0.0
    for left, right, in_block in zip(reference, model, in_blocks, strict=True):
        step = max(1, _CHUNK_ELEMENTS // right[0].numel())
        for start in range(0, len(order), step):
            rows = slice(start, start + step)
            index = torch.from_numpy(in_block[rows])[:, :, None].expand(-1, -1, right.shape[2])
            new += _flat_product(left[rows], right[units[rows]].gather(1, index))
    return is_better(new, stay)


def _matched_by_tensor(
    symmetry: Symmetry, pair_of: Callable[[Move], _Pair], model: Reader
) -> Orders:
    """As `_matched`, with one tensor of both sides in memory at a time."""
    table = np.zeros((symmetry.size, symmetry.size))
    for move in symmetry.moves:
        left, right = pair_of(move)
        table += benefits([left.flatten(1)], [right.flatten(1)])
    if not np.isfinite(table).all():
        raise _not_finite(f"One of the tensors of the {symmetry.name}")
    order = order_if_better(table)
    if order is None:
        return {}
    return orders_of_units(symmetry, order, unmoved_blocks(symmetry), model)


def _not_finite(what: str) -> KarcherError:
    return KarcherError(
        f"{what} is not finite everywhere in one of the models: repair that model, or leave it out."
    )


def _flat(blocks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [block.flatten(1) for block in blocks]


def _flat_product(left: torch.Tensor, right: torch.Tensor) -> float:
    """The inner product of two tensors of one shape."""
    return inner_product([left.reshape(len(left), -1)], [right.reshape(len(right), -1)])
