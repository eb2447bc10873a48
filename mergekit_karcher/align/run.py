"""An alignment from beginning to end: models in, orders found, models out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mergekit_karcher.align import alignment as alignments
from mergekit_karcher.align import specification_file
from mergekit_karcher.align.alignment import Alignment
from mergekit_karcher.align.checkpoint import Checkpoint
from mergekit_karcher.align.families import specification_for
from mergekit_karcher.align.joint import (
    align_jointly,
    mean_between,
    products_between,
    spread_of,
    steps_of,
)
from mergekit_karcher.align.match import align_to_reference
from mergekit_karcher.align.orders import Orders, Reader, arranged
from mergekit_karcher.align.pad import padded, widened
from mergekit_karcher.align.symmetry import Shapes, Specification, components_of
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.headers import identical, is_constant
from mergekit_karcher.sphere.pairwise import geometry_of_gram
from mergekit_karcher.sphere.trig import Floats


@dataclass(frozen=True)
class Choices:
    """How to align.

    reference: the reference of the model that all others are matched to; None to match jointly.
    spec: a file with a specification of the symmetries; None for that of a known family.
    assume_stack: whether raw checkpoints are the plain stacks of layers that their names suggest.
    pad: whether narrower MLPs are filled up with units of zeros.
    alignment: an alignment.json whose orders are applied, so that nothing is matched.
    starts, seed: see `match.nearest_orders` and `joint.align_jointly`.
    """

    reference: str | None = None
    spec: Path | None = None
    assume_stack: bool = False
    residual: bool = False
    pad: bool = False
    alignment: Path | None = None
    starts: int = 3
    seed: int = 0


class Geometry(NamedTuple):
    """How far the models are apart: angles (N, N) and spread around their Karcher mean, radians."""

    angles: Floats
    spread: float


@dataclass(frozen=True, eq=False)
class AlignedModel:
    """A model with its orders.

    narrow, wide: its symmetries as it is, and with the units of zeros that it gets.
    orders: of its tensors, once they are padded.
    """

    checkpoint: Checkpoint
    narrow: Specification
    wide: Specification
    orders: Orders

    @property
    def is_padded(self) -> bool:
        """Whether it gets units of zeros."""
        return self.wide is not self.narrow

    @property
    def changed(self) -> bool:
        """Whether it is permuted or padded."""
        return bool(self.orders) or self.is_padded

    @property
    def file_shapes(self) -> Shapes:
        """The shapes of the tensors that are written, by the names that the checkpoint has."""
        return {**self.wide.shapes, **{n: self.checkpoint.shapes[n] for n in self.wide.places}}

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the specification, padded and in its order."""
        return arranged(self._padded(self.checkpoint.read)(name), name, self.orders)

    def written(self, read: Reader, name: str) -> torch.Tensor:
        """A tensor of the checkpoint, or of a metric of it, as it is written: in its new order.

        read: reads the tensors of the checkpoint or the metric.
        """
        if name not in self.wide.places:
            return arranged(self._padded(read)(name), name, self.orders)
        whole, place = self.wide.places[name]
        parts, axis = self.wide.joined[whole]
        length = self.checkpoint.shapes[name][axis]
        # An expert comes from one place, so that only its own tensor has to be read.
        order = self.orders.get((whole, axis), torch.arange(length * len(parts)))
        indices = order[place * length : (place + 1) * length]
        source = int(indices[0]) // length
        orders = {(name, a): o for (tensor, a), o in self.orders.items() if tensor == whole}
        return arranged(
            read(parts[source]), name, orders | {(name, axis): indices - source * length}
        )

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a tensor of the specification."""
        return self.checkpoint.dtypes[self.wide.parts_of(name)[0]]

    def _padded(self, read: Reader) -> Reader:
        def whole(name: str) -> torch.Tensor:
            if name not in self.narrow.joined:
                return read(name)
            parts, axis = self.narrow.joined[name]
            return torch.cat([read(part) for part in parts], axis)

        return padded(whole, self.narrow, self.wide)


@dataclass(frozen=True, eq=False)
class Aligned:
    """Models with the orders that were found for them.

    specification: the symmetries of all, at their common widths.
    alignment: the orders of all, to be written.
    counts: whole numbers that differ between the models, such as the batches that a batch norm has
        seen, as all get them: mergekit stops where they differ.
    before, after: how far the models are apart, over the tensors of one shape in all of them.
    """

    models: Sequence[AlignedModel]
    specification: Specification
    alignment: Alignment
    counts: Mapping[str, torch.Tensor]
    before: Geometry
    after: Geometry

    @property
    def changed(self) -> bool:
        """Whether any model is permuted, padded, or gets the counts of another one."""
        return any(model.changed for model in self.models) or bool(self.counts)

    def moved_shares(self) -> dict[str, float]:
        """The share of units that moved, by symmetry, over all models but one."""
        shares = {}
        for symmetry in self.specification.symmetries:
            move = symmetry.moves[0]
            places = torch.arange(symmetry.size) * move.block + move.offset
            total = 0.0
            for model in self.models:
                order = model.orders.get((move.tensor, move.axis))
                # The rows of a unit may be permuted, too: the first one shows which unit it is.
                units = places if order is None else order[places]
                units = (units - move.offset).div(move.block, rounding_mode="floor")
                total += float((units != torch.arange(symmetry.size)).double().mean())
            shares[symmetry.name] = total / max(1, len(self.models) - 1)
        return shares


def align(
    checkpoints: Sequence[Checkpoint],
    choices: Choices,
    expect: Callable[[int], None],
    advance: Callable[[str], None],
) -> Aligned:
    """Find the orders that bring models of one architecture nearest to each other; write nothing.

    checkpoints: each of another name.
    expect: called once with the number of steps. advance: called with the name of each, first.
    Raises `KarcherError` if the models do not fit each other, or a choice does not fit them.
    """
    names = [checkpoint.name for checkpoint in checkpoints]
    specifications = [_specification_of(checkpoint, choices) for checkpoint in checkpoints]
    wide = widened(specifications, names, choices.pad)
    _refuse_quantised(checkpoints, wide[0])
    unordered = [
        AlignedModel(*parts, {}) for parts in zip(checkpoints, specifications, wide, strict=True)
    ]
    expect(_steps(wide[0], choices))
    alignment = _alignment(unordered, choices, advance)
    models = [
        replace(model, orders=alignment.orders_of(model.checkpoint.name, model.wide.shapes))
        for model in unordered
    ]
    advance("distances")
    before = _geometry_of(unordered)
    after = _geometry_of(models) if any(model.orders for model in models) else before
    return Aligned(models, wide[0], alignment, _common_counts(checkpoints), before, after)


def _specification_of(checkpoint: Checkpoint, choices: Choices) -> Specification:
    if choices.spec is not None:
        return specification_file.read(choices.spec, checkpoint.shapes)
    try:
        return specification_for(
            checkpoint.config, checkpoint.shapes, choices.residual, choices.assume_stack
        )
    except KeyError as error:
        raise KarcherError(
            f"The config or the weights of {checkpoint.reference} lack {error}, which models "
            "of its type have."
        ) from None


def _refuse_quantised(checkpoints: Sequence[Checkpoint], specification: Specification) -> None:
    for checkpoint in checkpoints:
        moved = sorted(specification.tensors())
        for name in (part for tensor in moved for part in specification.parts_of(tensor)):
            if not checkpoint.dtypes[name].is_floating_point:
                raise KarcherError(
                    f"{name} of {checkpoint.name} is {checkpoint.dtypes[name]}: a quantised model "
                    "must be dequantised before it is aligned."
                )


def _steps(specification: Specification, choices: Choices) -> int:
    """How often `align` calls advance: for the distances, and for what is matched before them."""
    if choices.alignment is not None:
        return 1
    if choices.reference is None:
        return 1 + steps_of(specification, choices.starts)
    return 1 + len(components_of(specification.symmetries))


def _alignment(
    models: Sequence[AlignedModel], choices: Choices, advance: Callable[[str], None]
) -> Alignment:
    """The alignment that was chosen, or else one that is found by matching."""
    specification = models[0].wide
    if choices.alignment is not None:
        return alignments.read(choices.alignment, specification)
    names = [model.checkpoint.name for model in models]
    readers = [model.read for model in models]
    how = (readers, choices.starts, choices.seed, advance)
    if choices.reference is None:
        orders = align_jointly(specification, *how)
        return alignments.alignment_of(specification, None, names, orders)
    index = [model.checkpoint.reference for model in models].index(choices.reference)
    orders = align_to_reference(specification, index, *how)
    return alignments.alignment_of(specification, names[index], names, orders)


def _geometry_of(models: Sequence[AlignedModel]) -> Geometry:
    """Over the parameters that all models have in one shape."""
    first = models[0]
    names = [
        name
        for name, shape in first.wide.shapes.items()
        if all(model.wide.shapes.get(name) == shape for model in models)
        and first.dtype_of(name).is_floating_point
        and not _is_shared_constant(models, name)
    ]
    products = products_between(names, [model.read for model in models], [{} for _ in models])
    sphere = geometry_of_gram(products.grams[0], products.exponents[0])
    mean = mean_between(products, range(len(models)))
    return Geometry(sphere.angles, spread_of(mean) if len(models) > 1 else float(np.nan))


def _is_shared_constant(models: Sequence[AlignedModel], name: str) -> bool:
    """Whether a tensor is no parameter: by its name, or since all have the same infinite values."""
    first = models[0]
    if is_constant(name, first.wide.shapes[name]):
        return True
    if name in first.wide.tensors() or bool(torch.isfinite(first.read(name)).all()):
        return False
    return identical(model.read(name) for model in models)


def _common_counts(checkpoints: Sequence[Checkpoint]) -> Mapping[str, torch.Tensor]:
    """Buffers of whole numbers that differ between models, as the first model has them."""
    first, *others = checkpoints
    return {
        name: first.read(name)
        for name, dtype in first.dtypes.items()
        if not dtype.is_floating_point
        and any(
            other.shapes.get(name) == first.shapes[name]
            and not identical([other.read(name), first.read(name)])
            for other in others
        )
    }
