"""Match the units of several models to each other, with none of them as the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from mergekit_karcher.align.match import descend, nearest_orders, tensors_of
from mergekit_karcher.align.orders import (
    Orders,
    Reader,
    arranged,
    follow_with,
    is_identity,
    stopped_falling,
)
from mergekit_karcher.align.symmetry import Specification, Symmetry, components_of
from mergekit_karcher.means.inputs import checked_inputs
from mergekit_karcher.means.products import Products, products_of, total
from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.means.solve import Settings, mean_of_products

_MOST_ROUNDS = 50


def align_jointly(
    specification: Specification,
    models: Sequence[Reader],
    starts: int,
    seed: int,
    advance: Callable[[str], None],
) -> list[Orders]:
    """Match each model in turn to the Karcher mean of the others, until their spread stops falling.

    The tensors of each component of symmetries are vectors of their own. Each start begins with
    all models matched to another one of them; the orders with the least spread are kept. advance
    is called with what comes next, `steps_of` times. The orders of the first model are empty: one
    order that all models share changes nothing and is taken back.
    """
    result: list[Orders] = [{} for _ in models]
    for component in components_of(specification.symmetries):
        component_orders = _match_component(component, models, starts, seed, advance)
        back = {key: torch.argsort(order) for key, order in component_orders[0].items()}
        for orders, more in zip(result, component_orders, strict=True):
            follow_with(more, back)
            orders |= {key: o for key, o in more.items() if not is_identity(o.numpy())}
    return result


def steps_of(specification: Specification, starts: int) -> int:
    """How many steps `align_jointly` takes: a first look at each component, and its starts."""
    return sum(1 + _starts_of(c, starts) for c in components_of(specification.symmetries))


def _starts_of(component: Sequence[Symmetry], starts: int) -> int:
    """A single symmetry has one best order, wherever its search starts."""
    return starts if len(component) > 1 else 1


def products_between(
    names: Iterable[str], models: Sequence[Reader], orders: Sequence[Orders]
) -> Products:
    """The inner products of models, each in its order, over those tensors together.

    The tensors have one shape in all models; those of whole numbers are left out. Raises
    `KarcherError` if a value is not finite.
    """
    labels = [str(index) for index in range(len(models))]
    parts = []
    for name in names:
        tensors = [
            arranged(model(name), name, order) for model, order in zip(models, orders, strict=True)
        ]
        if tensors[0].is_floating_point():
            parts.append(products_of(checked_inputs(name, tensors, labels, [1.0] * len(labels))))
    return total(parts)


def mean_between(products: Products, chosen: Sequence[int]) -> KarcherMean:
    """The equally weighted Karcher mean of the models with those indices, in that order."""
    return mean_of_products(products.of(list(chosen)), np.ones(len(chosen)), Settings())


def spread_of(mean: KarcherMean) -> float:
    """The root mean square of the angles between a mean and its inputs, radians."""
    return float(np.sqrt(np.mean(np.square(mean.angles))))


def _spread(
    component: Sequence[Symmetry], models: Sequence[Reader], orders: Sequence[Orders]
) -> float:
    products = products_between(tensors_of(component), models, orders)
    return spread_of(mean_between(products, range(len(models))))


def _match_component(
    component: Sequence[Symmetry],
    models: Sequence[Reader],
    starts: int,
    seed: int,
    advance: Callable[[str], None],
) -> list[Orders]:
    """The orders of each model with the least spread, over several starts."""
    advance(component[0].name)
    best: list[Orders] = [{} for _ in models]
    moved = _match_each_once(component, models, best, seed)
    least = np.inf
    count = _starts_of(component, starts)
    for start in range(count):
        advance(f"{component[0].name}, start {start + 1} of {count}")
        if not moved:
            continue
        reference = start % len(models)
        orders: list[Orders] = [{} for _ in models]
        for index, model in enumerate(models):
            if index != reference:
                orders[index] = nearest_orders(component, models[reference], model, 1, seed + start)
        orders, spread = _match_until_still(component, models, orders, seed + start)
        if start == 0 or spread < least:
            best, least = orders, spread
    return best


def _match_until_still(
    component: Sequence[Symmetry], models: Sequence[Reader], orders: list[Orders], seed: int
) -> tuple[list[Orders], float]:
    """Match every model to the others in rounds, from orders on, until the spread stops falling."""
    spread = _spread(component, models, orders)
    for turn in range(_MOST_ROUNDS):
        before = [dict(order) for order in orders]
        moved = _match_each_once(component, models, orders, seed + turn)
        new = _spread(component, models, orders)
        if not moved or stopped_falling(new, spread):
            return (orders, new) if new < spread else (before, spread)
        spread = new
    return orders, spread


def _match_each_once(
    component: Sequence[Symmetry], models: Sequence[Reader], orders: list[Orders], seed: int
) -> bool:
    """Match every model to the mean of the others once; whether any moved. Orders change."""
    moved = False
    for index, model in enumerate(models):
        others = [other for other in range(len(models)) if other != index]
        products = products_between(tensors_of(component), models, orders)
        factors = mean_between(products, others).coefficients.tolist()
        parts = [(models[o], orders[o], f) for o, f in zip(others, factors, strict=True)]
        moved |= descend(component, _reader_of_sum(parts), model, orders[index], seed)
    return moved


def _reader_of_sum(parts: Sequence[tuple[Reader, Orders, float]]) -> Reader:
    """Reads tensors of the sum of models, each in its order and times its factor."""

    def read(name: str) -> torch.Tensor:
        result = torch.zeros(())
        for model, order, factor in parts:
            tensor = arranged(model(name), name, order)
            # Sums of 16-bit tensors would be rounded to 16 bits.
            result = result + tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor
        return result

    return read
