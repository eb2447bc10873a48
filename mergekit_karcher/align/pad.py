"""Models of one family whose hidden widths differ, brought to one width by units of zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from mergekit_karcher.align.match import Get
from mergekit_karcher.align.symmetry import Shapes, Specification, Symmetry
from mergekit_karcher.errors import KarcherError


class Padding(NamedTuple):
    """How many units of zeros a model gets, by symmetry, and the shapes that it has then."""

    added: dict[str, int]
    shapes: dict[str, tuple[int, ...]]


def paddings(
    specifications: Sequence[Specification], names: Sequence[str], allowed: bool
) -> list[Padding]:
    """What brings all models to the widths of the widest; raises unless only widths differ.

    names: of the models, for the messages. allowed: whether to pad at all.
    """
    first = specifications[0]
    for own, name in zip(specifications, names, strict=True):
        if [s.name for s in own.symmetries] != [s.name for s in first.symmetries]:
            raise KarcherError(
                f"{names[0]} and {name} have not the same layers: only models of one architecture "
                "can be aligned."
            )
    result = [Padding({}, dict(own.shapes)) for own in specifications]
    for place, symmetry in enumerate(first.symmetries):
        sizes = [own.symmetries[place].size for own in specifications]
        if len(set(sizes)) == 1:
            continue
        shown = ", ".join(f"{size} in {name}" for size, name in zip(sizes, names, strict=True))
        if not symmetry.padding:
            raise KarcherError(
                f"{symmetry.name} has {shown} units: padding with zeros would change what these "
                "models compute, so they cannot be aligned."
            )
        if not allowed:
            raise KarcherError(
                f"{symmetry.name} has {shown} units: --pad fills the narrower ones up with units "
                "that do nothing."
            )
        for own, padding in zip(specifications, result, strict=True):
            _widen(own.symmetries[place], max(sizes), padding)
    for own, name in zip(specifications, names, strict=True):
        for mine, theirs in zip(first.symmetries, own.symmetries, strict=True):
            if (mine.moves, mine.inside) != (theirs.moves, theirs.inside):
                lacking = {m.tensor for m in mine.moves} ^ {m.tensor for m in theirs.moves}
                what = (
                    f"only one of them has {', '.join(sorted(lacking))}"
                    if lacking
                    else (f"{mine.name} is built differently")
                )
                raise KarcherError(
                    f"{names[0]} and {name} cannot be aligned with each other: {what}."
                )
    for name in sorted(first.tensors()):
        for padding, model in zip(result, names, strict=True):
            if padding.shapes[name] != result[0].shapes[name]:
                raise KarcherError(
                    f"{name} has shape {padding.shapes[name]} in {model}, but "
                    f"{result[0].shapes[name]} in {names[0]}: zeros in the residual stream would "
                    "change what its normalisation divides by, so only the widths of MLPs can "
                    "differ."
                )
    return result


def _widen(symmetry: Symmetry, size: int, padding: Padding) -> None:
    more = size - symmetry.size
    if not more:
        return
    padding.added[symmetry.name] = more
    for move in symmetry.moves:
        shape = list(padding.shapes[move.tensor])
        shape[move.axis] += more * move.block
        padding.shapes[move.tensor] = tuple(shape)


def padded(get: Get, specification: Specification, padding: Padding) -> Get:
    """A model with its units of zeros."""
    if not padding.added:
        return get
    grown: dict[str, list[tuple[int, int, int]]] = {}
    for symmetry in specification.symmetries:
        more = padding.added.get(symmetry.name, 0)
        for move in symmetry.moves if more else ():
            end = move.offset + symmetry.size * move.block
            grown.setdefault(move.tensor, []).append((move.axis, end, more * move.block))

    def wide(name: str) -> torch.Tensor:
        tensor = get(name)
        for axis, end, more in grown.get(name, ()):
            shape = list(tensor.shape)
            shape[axis] = more
            # A variance of zero would leave a division by almost nothing.
            value = 1 if name.endswith("running_var") else 0
            filling = torch.full(shape, value, dtype=tensor.dtype)
            after = tensor.narrow(axis, end, tensor.shape[axis] - end)
            tensor = torch.cat([tensor.narrow(axis, 0, end), filling, after], axis)
        return tensor

    return wide


def widened(specification: Specification, shapes: Shapes, padding: Padding) -> Specification:
    """The specification of a model that has its units of zeros."""
    symmetries = tuple(
        replace(symmetry, size=symmetry.size + padding.added.get(symmetry.name, 0))
        for symmetry in specification.symmetries
    )
    return replace(specification, shapes=shapes, symmetries=symmetries)
