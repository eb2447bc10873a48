"""Matching the units of models: to a reference, or jointly to the Karcher mean of the others.

Symmetries that share a tensor hang together in a component, and are matched in turns (coordinate
descent); each turn is an exact assignment, given the rest. Tensors are loaded when a turn needs
them and forgotten after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_karcher.align.assign import (
    Indices,
    along,
    assign,
    benefits,
    best_order,
    least_distances,
    some_columns,
    squared_distances,
)
from mergekit_karcher.align.symmetry import Inside, Move, Specification, Symmetry, components_of
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.means.karcher import (
    Group,
    Products,
    Settings,
    mean_of_products,
    products_of,
    total,
)
from mergekit_karcher.means.result import KarcherMean

# Gives a tensor by name; borrowed.
Get = Callable[[str], torch.Tensor]
# For an axis of a tensor, which index comes to each place.
Orders = dict[tuple[str, int], torch.Tensor]

# A symmetry of more tensors than this (the residual stream) is matched one tensor at a time.
_MOST_TENSORS = 16
# Elements of units that are put into another order at once.
_CHUNK_ELEMENTS = 1 << 20
# The columns that a bound looks at.
_BOUND_SHARE = 1 / 8
_MOST_SWEEPS = 100
_MOST_ROUNDS = 50
# What counts as an improvement, relative to the whole: less is rounding.
_IMPROVEMENT = 1e-12


def arranged(tensor: torch.Tensor, name: str, orders: Orders) -> torch.Tensor:
    """The tensor with its axes in that order; a copy only where one moves."""
    for axis in range(tensor.ndim):
        order = orders.get((name, axis))
        if order is not None:
            tensor = tensor.index_select(axis, order)
    return tensor


def align_to_reference(
    specification: Specification,
    reference: int,
    models: Sequence[Get],
    starts: int,
    seed: int,
    advance: Callable[[str], None],
) -> list[Orders]:
    """Orders for each model that bring it nearest to the reference, whose own are empty.

    starts: how often coordinate descent begins anew where symmetries hang together, first as the
    models are, then from random orders; the nearest counts. advance is told of each component.
    """
    result: list[Orders] = [{} for _ in models]
    for component in components_of(specification.symmetries):
        advance(component[0].name)
        for index, get in enumerate(models):
            if index != reference:
                found = _nearest(component, models[reference], get, starts, seed)
                result[index].update(found)
    return result


def align_jointly(
    specification: Specification,
    models: Sequence[Get],
    starts: int,
    seed: int,
    advance: Callable[[str], None],
) -> list[Orders]:
    """Orders for each model that bring them nearest to each other, with no favourite.

    In turns each model is matched to the Karcher mean of the others, until none moves or their
    spread around their mean falls no more; a component is a sphere of its own. starts: how often
    that begins anew, with another model as the first reference; the least spread counts. The first
    model keeps its order in the end: what all share is taken back.
    """
    result: list[Orders] = [{} for _ in models]
    for component in components_of(specification.symmetries):
        advance(component[0].name)
        found = _joint(component, models, starts, seed)
        back = {key: torch.argsort(order) for key, order in found[0].items()}
        for own, orders in zip(result, found, strict=True):
            _follow(orders, back)
            own.update({key: order for key, order in orders.items() if not _is_identity(order)})
    return result


def spread_of(mean: KarcherMean) -> float:
    """The root mean square of the angles to the mean (radians), all models alike."""
    return float(np.sqrt(np.mean(np.square(mean.angles))))


def products_between(
    names: Iterable[str], models: Sequence[Get], orders: Sequence[Orders]
) -> Products:
    """Inner products of the models over those tensors, each model in its order."""
    labels = [str(index) for index in range(len(models))]
    parts = []
    for name in names:
        tensors = [arranged(get(name), name, own) for get, own in zip(models, orders, strict=True)]
        if tensors[0].is_floating_point():
            parts.append(products_of(Group(name, tensors, labels)))
    return total(parts)


def mean_between(products: Products, chosen: Sequence[int]) -> KarcherMean:
    """The Karcher mean of some of the models, equal weights, in coefficients over those."""
    index = np.array(chosen)
    some = Products(products.grams[:, index[:, None], index], products.exponents[:, index])
    return mean_of_products(some, [1.0] * len(chosen), Settings())


def _joint(
    component: Sequence[Symmetry], models: Sequence[Get], starts: int, seed: int
) -> list[Orders]:
    names = sorted({move.tensor for symmetry in component for move in symmetry.moves})
    count = len(models)
    orders: list[Orders] = [{} for _ in models]
    if not _round(component, names, models, orders, seed):
        return orders
    best: list[Orders] = []
    least = np.inf
    for start in range(starts if len(component) > 1 else 1):
        reference = start % count
        orders = [
            {}
            if index == reference
            else _nearest(component, models[reference], get, 1, seed + start)
            for index, get in enumerate(models)
        ]
        spread = _spread(names, models, orders)
        for turn in range(_MOST_ROUNDS):
            before = [dict(own) for own in orders]
            moved = _round(component, names, models, orders, seed + start + turn)
            now = _spread(names, models, orders)
            if not moved or now > spread * (1 - _IMPROVEMENT):
                orders = orders if now < spread else before
                break
            spread = now
        spread = _spread(names, models, orders)
        if not best or spread < least:
            best, least = orders, spread
    return best


def _spread(names: Sequence[str], models: Sequence[Get], orders: Sequence[Orders]) -> float:
    products = products_between(names, models, orders)
    return spread_of(mean_between(products, range(len(models))))


def _round(
    component: Sequence[Symmetry],
    names: Sequence[str],
    models: Sequence[Get],
    orders: list[Orders],
    seed: int,
) -> bool:
    """Match every model to the mean of the others once; whether any moved."""
    moved = False
    for index, get in enumerate(models):
        others = [other for other in range(len(models)) if other != index]
        products = products_between(names, models, orders)
        coefficients = mean_between(products, others).coefficients

        def reference(
            name: str, others: Sequence[int] = others, k: NDArray[np.floating] = coefficients
        ) -> torch.Tensor:
            mean = torch.zeros(())
            for factor, other in zip(k.tolist(), others, strict=True):
                tensor = arranged(models[other](name), name, orders[other])
                # Sums of 16-bit tensors would be rounded to 16 bits.
                mean = mean + tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor
            return mean

        moved |= _descend(component, reference, get, orders[index], seed)
    return moved


def _nearest(
    component: Sequence[Symmetry], reference: Get, model: Get, starts: int, seed: int
) -> Orders:
    """The best of several descents; a single symmetry needs but one, which is exact."""
    names = sorted({move.tensor for symmetry in component for move in symmetry.moves})
    best: Orders = {}
    most = -np.inf
    for start in range(starts if len(component) > 1 else 1):
        orders = random_orders(component, model, seed + start) if start else {}
        _descend(component, reference, model, orders, seed + start)
        if len(component) == 1:
            return orders
        reached = sum(
            _inner(reference(name), arranged(model(name), name, orders)) for name in names
        )
        if start == 0 or reached > most + abs(most) * _IMPROVEMENT:
            best, most = orders, reached
    return best


def _descend(
    component: Sequence[Symmetry], reference: Get, model: Get, orders: Orders, seed: int
) -> bool:
    """Match the symmetries of a component in turns until none moves; orders are changed."""
    generator = np.random.default_rng(seed)
    moved = False
    for _ in range(_MOST_SWEEPS):
        changed = False
        for place in generator.permutation(len(component)):
            found = _matched(component[place], reference, model, orders)
            if found:
                _follow(orders, found)
                changed = True
        moved |= changed
        if not changed or len(component) == 1:
            break
    return moved


def _matched(symmetry: Symmetry, reference: Get, model: Get, orders: Orders) -> Orders:
    """What the best order of a symmetry adds to the orders of a model; nothing if it may stay."""

    def pair(move: Move) -> tuple[torch.Tensor, torch.Tensor]:
        own = arranged(model(move.tensor), move.tensor, orders)
        return blocks(reference(move.tensor), move, symmetry.size), blocks(own, move, symmetry.size)

    if len(symmetry.moves) > _MOST_TENSORS and not symmetry.inside:
        return _streamed(symmetry, pair, model)
    pairs = [pair(move) for move in symmetry.moves]
    left, right = [a.flatten(1) for a, _ in pairs], [b.flatten(1) for _, b in pairs]
    try:
        if symmetry.inside:
            if stays(symmetry, [a for a, _ in pairs], [b for _, b in pairs]):
                return {}
            order, inner = _nested(symmetry, pairs)
        else:
            order = assign(left, right)
            inner = [np.tile(np.arange(move.block), (symmetry.size, 1)) for move in symmetry.moves]
    except ValueError:
        # No bound holds for such values, and no assignment is found: so only then they are sought.
        for move, sides in zip(symmetry.moves, pairs, strict=True):
            if not all(bool(torch.isfinite(side).all()) for side in sides):
                raise _not_finite(move.tensor) from None
        raise
    gain = _gain(left, right, symmetry, order, inner, pairs)
    if not gain:
        return {}
    return _as_orders(symmetry, order, inner, model)


def _not_finite(what: str) -> KarcherError:
    return KarcherError(
        f"{what} is not finite everywhere in one of the models: repair that one, or leave it out."
    )


def _gain(
    left: Sequence[torch.Tensor],
    right: Sequence[torch.Tensor],
    symmetry: Symmetry,
    order: Indices,
    inner: Sequence[NDArray[np.intp]],
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> bool:
    """Whether the new order is better than to stay, by more than rounding."""
    identity = bool((order == np.arange(symmetry.size)).all()) and all(
        bool((part == np.arange(part.shape[1])).all()) for part in inner
    )
    if identity:
        return False
    stay = float(along(left, right).sum())
    chosen = torch.from_numpy(order)
    new = 0.0
    for (a, b), part in zip(pairs, inner, strict=True):
        step = max(1, _CHUNK_ELEMENTS // b[0].numel())
        for start in range(0, symmetry.size, step):
            rows = slice(start, start + step)
            index = torch.from_numpy(part[rows])[:, :, None].expand(-1, -1, b.shape[2])
            new += _inner(a[rows], b[chosen[rows]].gather(1, index))
    scale = max(abs(stay), abs(new))
    return new > stay + scale * _IMPROVEMENT


def _streamed(
    symmetry: Symmetry, pair: Callable[[Move], tuple[torch.Tensor, torch.Tensor]], model: Get
) -> Orders:
    table = sum(
        (benefits([a.flatten(1)], [b.flatten(1)]) for a, b in map(pair, symmetry.moves)),
        np.zeros((symmetry.size, symmetry.size)),
    )
    if not np.isfinite(table).all():
        raise _not_finite(f"One of the tensors of the {symmetry.name}")
    stay = float(np.trace(table))
    order = best_order(table.copy())
    new = float(table[np.arange(symmetry.size), order].sum())
    if new <= stay + max(abs(stay), abs(new)) * _IMPROVEMENT:
        return {}
    inner = [np.tile(np.arange(move.block), (symmetry.size, 1)) for move in symmetry.moves]
    return _as_orders(symmetry, order, inner, model)


def blocks(tensor: torch.Tensor, move: Move, size: int) -> torch.Tensor:
    """The units of a move as (size, block, rest)."""
    part = tensor.narrow(move.axis, move.offset, size * move.block).movedim(move.axis, 0)
    return part.reshape(size, move.block, -1)


def _as_orders(
    symmetry: Symmetry, order: Indices, inner: Sequence[NDArray[np.intp]], model: Get
) -> Orders:
    found: Orders = {}
    for move, part in zip(symmetry.moves, inner, strict=True):
        key = (move.tensor, move.axis)
        if key not in found:
            found[key] = torch.arange(model(move.tensor).shape[move.axis])
        places = move.offset + order[:, None] * move.block + part
        end = move.offset + symmetry.size * move.block
        found[key][move.offset : end] = torch.from_numpy(places.ravel())
    return found


def _follow(orders: Orders, more: Mapping[tuple[str, int], torch.Tensor]) -> None:
    """Apply more on top of orders, in place."""
    for key, order in more.items():
        old = orders.get(key)
        orders[key] = order if old is None else old[order]


def _is_identity(order: torch.Tensor) -> bool:
    return bool((order == torch.arange(len(order))).all())


def random_orders(component: Sequence[Symmetry], model: Get, seed: int) -> Orders:
    """Units in random orders, and what is inside of each, too."""
    generator = np.random.default_rng(seed)
    orders: Orders = {}
    for symmetry in component:
        inner = [np.tile(np.arange(move.block), (symmetry.size, 1)) for move in symmetry.moves]
        for place in range(symmetry.size if symmetry.inside else 0):
            for inside in symmetry.inside:
                own = generator.permutation(inside.size)
                for move in inside.moves:
                    rows = slice(move.offset, move.offset + inside.size * move.block)
                    part = inner[move.move][place]
                    part[rows] = part[rows].reshape(inside.size, -1)[own].ravel()
        order = generator.permutation(symmetry.size)
        _follow(orders, _as_orders(symmetry, order, inner, model))
    return orders


def _inner(left: torch.Tensor, right: torch.Tensor) -> float:
    shape = (left.shape[0] if left.ndim else 1, -1)
    return float(along([left.reshape(shape)], [right.reshape(shape)]).sum())


def _nested(
    symmetry: Symmetry, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[Indices, list[NDArray[np.intp]]]:
    """The best order of units, each pair of which is compared at the best order inside of it."""
    size = symmetry.size
    table = np.empty((size, size))
    inner = [np.empty((size, size, move.block), np.intp) for move in symmetry.moves]
    for place in range(size):
        own = [a[place].double() for a, _ in pairs]
        for unit in range(size):
            other = [b[unit].double() for _, b in pairs]
            found = _inside(symmetry.inside, list(zip(own, other, strict=True)))
            table[place, unit], orders = found
            for target, order in zip(inner, orders, strict=True):
                target[place, unit] = order
    order = best_order(table)
    places = np.arange(size)
    return order, [part[places, order] for part in inner]


def _inside(
    symmetries: Sequence[Inside], pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[float, list[NDArray[np.intp]]]:
    """The best orders inside of two units, by coordinate descent, and what they reach."""
    orders = [torch.arange(a.shape[0]) for a, _ in pairs]
    for _ in range(_MOST_SWEEPS):
        changed = False
        for inside in symmetries:
            sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
            for move in inside.moves:
                a, b = pairs[move.move]
                rows = slice(move.offset, move.offset + inside.size * move.block)
                for side, tensor in zip(sides, (a, b[orders[move.move]]), strict=True):
                    side.append(tensor[rows].reshape(inside.size, -1))
            table = benefits(*sides)
            stay = float(np.trace(table))
            order = best_order(table.copy())
            new = float(table[np.arange(inside.size), order].sum())
            if new <= stay + max(abs(stay), abs(new)) * _IMPROVEMENT:
                continue
            changed = True
            for move in inside.moves:
                step = np.arange(len(orders[move.move]))
                rows = slice(move.offset, move.offset + inside.size * move.block)
                places = move.offset + order[:, None] * move.block + np.arange(move.block)
                step[rows] = places.ravel()
                orders[move.move] = orders[move.move][torch.from_numpy(step)]
        if not changed or len(symmetries) == 1:
            break
    reached = sum(_inner(a, b[order]) for (a, b), order in zip(pairs, orders, strict=True))
    return reached, [order.numpy() for order in orders]


def stays(
    symmetry: Symmetry, reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor]
) -> bool:
    """Whether it is proven, at little cost, that no order of units or inside of them is better.

    In another unit's place, and in whatever order inside, each row of a unit is no nearer than to
    the nearest row there; those distances are bounded from below, see `least_distances`.
    """
    size = symmetry.size
    least = torch.zeros(size, size, dtype=torch.float64)
    own = torch.zeros(size, dtype=torch.float64)
    for rows, indices in _alike(symmetry):
        left, right = (
            [side[index].reshape(size * rows, -1) for index in indices]
            for side in (reference, model)
        )
        table = least_distances(*(some_columns(side, _BOUND_SHARE) for side in (left, right)))
        table = table.view(size, rows, size, rows)
        exact = squared_distances(left, right, torch.arange(size * rows)).view(size, rows)
        inside = table[torch.arange(size), :, torch.arange(size)].clone()
        inside.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        if rows > 1 and not bool((exact < inside.amin(2)).all()):
            return False
        least += table.amin(3).clamp_(min=0).sum(1).double()
        own += exact.sum(1)
    least.fill_diagonal_(torch.inf)
    return bool((own < least.amin(1)).all())


def _alike(symmetry: Symmetry) -> list[tuple[int, list[int]]]:
    """Moves whose blocks are permuted alike inside, with the number of rows that move in them."""
    found: dict[tuple[object, ...], list[int]] = {}
    for index in range(len(symmetry.moves)):
        inner = [
            (place, move.offset, move.block)
            for place, inside in enumerate(symmetry.inside)
            for move in inside.moves
            if move.move == index
        ]
        grain = min((block for _, _, block in inner), default=0)
        rows = symmetry.moves[index].block // grain if grain else 1
        found.setdefault((rows, *inner), []).append(index)
    return [(int(str(key[0])), indices) for key, indices in found.items()]
