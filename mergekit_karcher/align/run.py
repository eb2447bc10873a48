"""An alignment from beginning to end: models in, orders found, models out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from mergekit_karcher.align.alignment import Alignment, alignment_of
from mergekit_karcher.align.checkpoint import Checkpoint
from mergekit_karcher.align.families import specification_for
from mergekit_karcher.align.match import (
    Get,
    Orders,
    align_jointly,
    align_to_reference,
    arranged,
    mean_between,
    products_between,
    spread_of,
)
from mergekit_karcher.align.pad import Padding, padded, paddings, widened
from mergekit_karcher.align.symmetry import Specification, from_yaml
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.sphere.pairwise import geometry_of_gram
from mergekit_karcher.sphere.trig import Floats


class Choices(NamedTuple):
    """How to align.

    reference: the place of the model that all others are matched to; None to do it jointly.
    spec: a specification of the user's own. residual: whether the residual stream moves too.
    """

    reference: int | None
    spec: Path | None = None
    residual: bool = False
    pad: bool = False
    starts: int = 3
    seed: int = 0


class Geometry(NamedTuple):
    """How far the models are apart: angles (N, N) and spread around their Karcher mean, radians."""

    angles: Floats
    spread: float


@dataclass(frozen=True, eq=False)
class Aligned:
    """Models with the orders that were found for them.

    own: the specification of each model. specification: of all, at their common widths. gets: their
    tensors, padded, not yet in order. before, after: their geometry over the tensors that all have
    in one shape.
    """

    checkpoints: Sequence[Checkpoint]
    own: Sequence[Specification]
    specification: Specification
    paddings: Sequence[Padding]
    gets: Sequence[Get]
    alignment: Alignment
    orders: Sequence[Orders]
    before: Geometry
    after: Geometry

    @property
    def changed(self) -> bool:
        """Whether any model moves, grows, or gets the counts of another."""
        return (
            any(self.orders)
            or any(padding.added for padding in self.paddings)
            or bool(_reconciled(self.checkpoints))
        )

    def moved(self) -> dict[str, float]:
        """The share of units that moved, by symmetry, over the models that may move."""
        shares = {}
        for symmetry in self.specification.symmetries:
            move = symmetry.moves[0]
            places = torch.arange(symmetry.size) * move.block + move.offset
            counts = []
            for own in self.orders:
                order = own.get((move.tensor, move.axis))
                # Inside of a unit the order may change, too: its first index shows where it is.
                units = places if order is None else order[places]
                units = (units - move.offset).div(move.block, rounding_mode="floor")
                counts.append(float((units != torch.arange(symmetry.size)).double().mean()))
            shares[symmetry.name] = sum(counts) / max(1, len(counts) - 1)
        return shares

    def write(self, out: Path) -> list[str]:
        """Write every model; returns their paths, or what they were if nothing changes them."""
        if not self.changed:
            return [
                str(Path(own.reference).resolve())
                if Path(own.reference).exists()
                else own.reference
                for own in self.checkpoints
            ]
        common = _reconciled(self.checkpoints)
        paths = []
        for checkpoint, padding, get, orders in zip(
            self.checkpoints, self.paddings, self.gets, self.orders, strict=True
        ):

            def change(
                name: str, tensor: torch.Tensor, get: Get = get, orders: Orders = orders
            ) -> torch.Tensor:
                if name in common:
                    return common[name]
                return arranged(get(name) if padding.added else tensor, name, orders)  # noqa: B023

            config = {}
            key = self.specification.width_key
            if padding.added and key is not None:
                config[key] = max(s.size for s in self.specification.symmetries if s.padding)
            path = checkpoint.write(out, change, padding.shapes, config)
            paths.append(str(path.resolve()))
        return paths

    def carry(self, index: int, metric: Checkpoint, out: Path) -> Path:
        """Write a metric of a model, named and shaped like its tensors, in that model's order."""
        padding, orders = self.paddings[index], self.orders[index]
        get = padded(metric.get, self.own[index], padding)

        def change(name: str, _: torch.Tensor) -> torch.Tensor:
            return arranged(get(name), name, orders)

        for name, shape in metric.shapes.items():
            if shape != self.checkpoints[index].shapes.get(name):
                raise KarcherError(
                    f"The metric {metric.reference} does not fit {self.checkpoints[index].name}: "
                    f"its {name} has shape {shape}."
                )
        return metric.write(out, change, padding.shapes, {})


def align(
    checkpoints: Sequence[Checkpoint],
    choices: Choices,
    known: Alignment | None,
    advance: Callable[[str], None],
) -> Aligned:
    """Find the orders that bring models of one architecture nearest to each other.

    known: an alignment to apply instead of matching. advance is told what is under way.
    """
    names = [checkpoint.name for checkpoint in checkpoints]
    specifications = [_specification(checkpoint, choices) for checkpoint in checkpoints]
    grown = paddings(specifications, names, choices.pad)
    gets = [
        padded(checkpoint.get, own, padding)
        for checkpoint, own, padding in zip(checkpoints, specifications, grown, strict=True)
    ]
    specification = widened(specifications[0], grown[0].shapes, grown[0])
    for checkpoint in checkpoints:
        for name in sorted(specification.tensors()):
            if not checkpoint.dtypes[name].is_floating_point:
                raise KarcherError(
                    f"{name} of {checkpoint.name} is {checkpoint.dtypes[name]}: a quantised model "
                    "must be dequantised before it is aligned."
                )
    if known is not None:
        known.check(specification)
        orders = [
            known.of(name, padding.shapes) for name, padding in zip(names, grown, strict=True)
        ]
    elif choices.reference is None:
        orders = align_jointly(specification, gets, choices.starts, choices.seed, advance)
    else:
        orders = align_to_reference(
            specification, choices.reference, gets, choices.starts, choices.seed, advance
        )
    reference = None if choices.reference is None else names[choices.reference]
    alignment = known or alignment_of(specification, reference, names, orders)
    advance("distances")
    shared = [
        name
        for name, shape in grown[0].shapes.items()
        if all(padding.shapes.get(name) == shape for padding in grown)
        and checkpoints[0].dtypes[name].is_floating_point
    ]
    before = _geometry(shared, gets, [{} for _ in gets])
    after = _geometry(shared, gets, orders) if any(orders) else before
    return Aligned(
        checkpoints, specifications, specification, grown, gets, alignment, orders, before, after
    )


def config_of(checkpoints: Sequence[Checkpoint], paths: Sequence[str]) -> dict[str, Any]:
    """A config that merges the aligned models by `merge_method: karcher`."""
    config: dict[str, Any] = {
        "merge_method": "karcher",
        "models": [{"model": path} for path in paths],
    }
    kinds = {
        dtype for own in checkpoints for dtype in own.dtypes.values() if dtype.is_floating_point
    }
    if len(kinds) == 1:
        config["dtype"] = str(kinds.pop()).removeprefix("torch.")
    return config


def _specification(checkpoint: Checkpoint, choices: Choices) -> Specification:
    if choices.spec is None:
        try:
            return specification_for(checkpoint.config, checkpoint.shapes, choices.residual)
        except KeyError as error:
            raise KarcherError(
                f"The config or the weights of {checkpoint.reference} lack {error}, which models "
                "of its type have."
            ) from None
    try:
        document = yaml.safe_load(choices.spec.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise KarcherError(f"{choices.spec} is not valid YAML: {where}.") from None
    return from_yaml(document, checkpoint.shapes)


def _geometry(names: Sequence[str], gets: Sequence[Get], orders: Sequence[Orders]) -> Geometry:
    products = products_between(names, gets, orders)
    sphere = geometry_of_gram(products.grams[0], products.exponents[0])
    mean = mean_between(products, range(len(gets)))
    return Geometry(sphere.angles, spread_of(mean) if len(gets) > 1 else float(np.nan))


def _reconciled(checkpoints: Sequence[Checkpoint]) -> dict[str, torch.Tensor]:
    """Single whole numbers that differ, such as counts of batches, as the first model has them.

    mergekit stops on those that differ.
    """
    first, *others = checkpoints
    names = [
        name
        for name, dtype in first.dtypes.items()
        if not dtype.is_floating_point and math.prod(first.shapes[name]) == 1
    ]
    return {
        name: first.get(name)
        for name in names
        if any(
            other.shapes.get(name) == first.shapes[name]
            and not torch.equal(other.get(name), first.get(name))
            for other in others
        )
    }
