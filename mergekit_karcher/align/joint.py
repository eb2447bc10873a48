"""Match the units of several models to each other, with none of them as the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

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
    """Find the orders that bring models nearest to each other.

    Each model in turn is matched to the Karcher mean of the others, until none moves or the spread
    of the models around their mean no longer falls. The tensors of each component of symmetries
    are vectors of their own.

    Arguments:
        specification: The symmetries that the models share.
        models: Their tensors; borrowed.
        starts: How often a component of several symmetries is matched, each time after all models
            were matched to another one of them. The orders with the least spread are kept.
        seed: Of the random orders, and of the sequence in which symmetries are matched.
        advance: Called with the name of each component before it is matched.

    Returns:
        The orders of each model; those of the first are empty, because one order that all models
        share changes nothing and is taken back.

    Raises:
        KarcherError: If a value of a tensor is not finite.
    """
    result: list[Orders] = [{} for _ in models]
    for component in components_of(specification.symmetries):
        advance(component[0].name)
        component_orders = _match_component(component, models, starts, seed)
        back = {key: torch.argsort(order) for key, order in component_orders[0].items()}
        for orders, more in zip(result, component_orders, strict=True):
            follow_with(more, back)
            orders |= {key: o for key, o in more.items() if not is_identity(o.numpy())}
    return result


def products_between(
    names: Iterable[str], models: Sequence[Reader], orders: Sequence[Orders]
) -> Products:
    """The inner products of models, each in its order.

    Arguments:
        names: The tensors that count, of one shape in all models; those of whole numbers are
            left out.
        models, orders: Their tensors, borrowed, and the orders of each.

    Returns:
        The products of the vectors that all these tensors make together.

    Raises:
        KarcherError: If a value is not finite.
    """
    labels = [str(index) for index in range(len(models))]
    parts = []
    for name in names:
        tensors = [
            arranged(model(name), name, order) for model, order in zip(models, orders, strict=True)
        ]
        if tensors[0].is_floating_point():
            inputs = checked_inputs(name, tensors, labels, [1.0] * len(labels))
            parts.append(products_of(inputs))
    return total(parts)


def mean_between(products: Products, chosen: Sequence[int]) -> KarcherMean:
    """The Karcher mean of some models, with equal weights.

    Arguments:
        products: The inner products of all models.
        chosen: The indices of those whose mean is taken.

    Returns:
        The mean; its coefficients are in the order of chosen.
    """
    return mean_of_products(products.of(list(chosen)), np.ones(len(chosen)), Settings())


def spread_of(mean: KarcherMean) -> float:
    """The root mean square of the angles between a mean and its inputs, radians."""
    return float(np.sqrt(np.mean(np.square(mean.angles))))


def _spread(names: Sequence[str], models: Sequence[Reader], orders: Sequence[Orders]) -> float:
    return spread_of(mean_between(products_between(names, models, orders), range(len(models))))


def _match_component(
    component: Sequence[Symmetry], models: Sequence[Reader], starts: int, seed: int
) -> list[Orders]:
    """The orders of each model with the least spread, over several starts."""
    names = tensors_of(component)
    best: list[Orders] = [{} for _ in models]
    if not _match_each_once(component, names, models, best, seed):
        return best
    least = np.inf
    for start in range(starts if len(component) > 1 else 1):
        reference = start % len(models)
        orders = [
            {}
            if index == reference
            else nearest_orders(component, models[reference], model, 1, seed + start)
            for index, model in enumerate(models)
        ]
        orders = _match_until_still(component, names, models, orders, seed + start)
        spread = _spread(names, models, orders)
        if start == 0 or spread < least:
            best, least = orders, spread
    return best


def _match_until_still(
    component: Sequence[Symmetry],
    names: Sequence[str],
    models: Sequence[Reader],
    orders: list[Orders],
    seed: int,
) -> list[Orders]:
    """Match every model to the others in rounds, from orders on, until the spread stops falling."""
    spread = _spread(names, models, orders)
    for turn in range(_MOST_ROUNDS):
        before = [dict(order) for order in orders]
        moved = _match_each_once(component, names, models, orders, seed + turn)
        new = _spread(names, models, orders)
        if not moved or stopped_falling(new, spread):
            return orders if new < spread else before
        spread = new
    return orders


def _match_each_once(
    component: Sequence[Symmetry],
    names: Sequence[str],
    models: Sequence[Reader],
    orders: list[Orders],
    seed: int,
) -> bool:
    """Match every model to the mean of the others once; whether any moved. Orders change."""
    moved = False
    for index, model in enumerate(models):
        others = [other for other in range(len(models)) if other != index]
        coefficients = mean_between(products_between(names, models, orders), others).coefficients
        mean = _reader_of_mean(
            [models[other] for other in others], [orders[other] for other in others], coefficients
        )
        moved |= descend(component, mean, model, orders[index], seed)
    return moved


def _reader_of_mean(
    models: Sequence[Reader], orders: Sequence[Orders], coefficients: NDArray[np.floating]
) -> Reader:
    """Reads tensors of the sum of models, each in its order and times its coefficient."""

    def read(name: str) -> torch.Tensor:
        mean = torch.zeros(())
        for model, order, factor in zip(models, orders, coefficients.tolist(), strict=True):
            tensor = arranged(model(name), name, order)
            # Sums of 16-bit tensors would be rounded to 16 bits.
            mean = mean + tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor
        return mean

    return read
