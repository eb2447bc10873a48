"""Models of one family whose hidden widths differ, brought to one width by units of zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from mergekit_karcher.align.orders import Reader
from mergekit_karcher.align.symmetry import Specification, Symmetry
from mergekit_karcher.errors import KarcherError


class Padding(NamedTuple):
    """How many units of zeros a model gets, by symmetry, and the shapes that it has then."""

    added: dict[str, int]
    shapes: dict[str, tuple[int, ...]]


def paddings(
    specifications: Sequence[Specification], names: Sequence[str], allowed: bool
) -> list[Padding]:
    """What brings every model to the width of the widest.

    Arguments:
        specifications: That of each model.
        names: The models, for messages.
        allowed: Whether models may be padded at all.

    Returns:
        The padding of each model; nothing is added where all have one width.

    Raises:
        KarcherError: If the models differ in more than widths, if a width differs that zeros
            cannot fill up without changing what the model computes, or if padding is not allowed.
    """
    first = specifications[0]
    for specification, name in zip(specifications, names, strict=True):
        if [s.name for s in specification.symmetries] != [s.name for s in first.symmetries]:
            raise KarcherError(
                f"{names[0]} and {name} do not have the same layers: only models of one "
                "architecture can be aligned."
            )
    result = [Padding({}, dict(specification.shapes)) for specification in specifications]
    for place in range(len(first.symmetries)):
        symmetries = [specification.symmetries[place] for specification in specifications]
        if len({symmetry.size for symmetry in symmetries}) > 1:
            _check_that_it_can_be_padded(symmetries, names, allowed)
            widest = max(symmetry.size for symmetry in symmetries)
            for symmetry, padding in zip(symmetries, result, strict=True):
                _add_units(symmetry, widest, padding)
    _check_same_moves(specifications, names)
    _check_same_shapes(first, result, names)
    return result


def padded(model: Reader, specification: Specification, padding: Padding) -> Reader:
    """Reads the tensors of a model with its units of zeros.

    Arguments:
        model: Its tensors without them; borrowed.
        specification: Its symmetries without them.
        padding: What it gets.

    Returns:
        A reader; model itself where nothing is added.
    """
    if not padding.added:
        return model
    # For each tensor the axis, where its units end, and how many places are added there.
    insertions: dict[str, list[tuple[int, int, int]]] = {}
    for symmetry in specification.symmetries:
        more = padding.added.get(symmetry.name, 0)
        for move in symmetry.moves if more else ():
            end = move.offset + symmetry.size * move.block
            insertions.setdefault(move.tensor, []).append((move.axis, end, more * move.block))

    def read(name: str) -> torch.Tensor:
        tensor = model(name)
        for axis, end, more in insertions.get(name, ()):
            shape = list(tensor.shape)
            shape[axis] = more
            # A variance of zero would be a division by almost nothing.
            value = 1 if name.endswith("running_var") else 0
            filling = torch.full(shape, value, dtype=tensor.dtype)
            after = tensor.narrow(axis, end, tensor.shape[axis] - end)
            tensor = torch.cat([tensor.narrow(axis, 0, end), filling, after], axis)
        return tensor

    return read


def padded_specification(specification: Specification, padding: Padding) -> Specification:
    """The specification of a model that has its units of zeros."""
    symmetries = tuple(
        replace(symmetry, size=symmetry.size + padding.added.get(symmetry.name, 0))
        for symmetry in specification.symmetries
    )
    return replace(specification, shapes=padding.shapes, symmetries=symmetries)


def _check_that_it_can_be_padded(
    symmetries: Sequence[Symmetry], names: Sequence[str], allowed: bool
) -> None:
    sizes = ", ".join(f"{s.size} in {name}" for s, name in zip(symmetries, names, strict=True))
    if not symmetries[0].padding:
        raise KarcherError(
            f"{symmetries[0].name} has {sizes} units: padding with zeros would change what these "
            "models compute, so they cannot be aligned."
        )
    if not allowed:
        raise KarcherError(
            f"{symmetries[0].name} has {sizes} units: --pad fills the narrower ones up with units "
            "that do nothing."
        )


def _add_units(symmetry: Symmetry, size: int, padding: Padding) -> None:
    """Note that a symmetry grows to a size; the padding is changed."""
    more = size - symmetry.size
    if not more:
        return
    padding.added[symmetry.name] = more
    for move in symmetry.moves:
        shape = list(padding.shapes[move.tensor])
        shape[move.axis] += more * move.block
        padding.shapes[move.tensor] = tuple(shape)


def _check_same_moves(specifications: Sequence[Specification], names: Sequence[str]) -> None:
    first = specifications[0]
    for specification, name in zip(specifications, names, strict=True):
        for ours, theirs in zip(first.symmetries, specification.symmetries, strict=True):
            if (ours.moves, ours.inside) == (theirs.moves, theirs.inside):
                continue
            lacking = {m.tensor for m in ours.moves} ^ {m.tensor for m in theirs.moves}
            if lacking:
                what = f"only one of them has {', '.join(sorted(lacking))}"
            else:
                what = f"{ours.name} is built differently"
            raise KarcherError(f"{names[0]} and {name} cannot be aligned with each other: {what}.")


def _check_same_shapes(
    first: Specification, result: Sequence[Padding], names: Sequence[str]
) -> None:
    for tensor in sorted(first.tensors()):
        for padding, name in zip(result, names, strict=True):
            if padding.shapes[tensor] != result[0].shapes[tensor]:
                raise KarcherError(
                    f"{tensor} has shape {padding.shapes[tensor]} in {name}, but "
                    f"{result[0].shapes[tensor]} in {names[0]}: zeros in the residual stream would "
                    "change what its normalisation divides by, so only the widths of MLPs can "
                    "differ."
                )
