"""Models of one family whose hidden widths differ, brought to one width by units of zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mergekit_karcher.align.orders import Reader
from mergekit_karcher.align.symmetry import Specification
from mergekit_karcher.errors import KarcherError


def widened(
    specifications: Sequence[Specification], names: Sequence[str], allowed: bool
) -> list[Specification]:
    """The specifications of models once units of zeros bring each to the width of the widest.

    names: the models, for messages. Raises `KarcherError` if they differ in more than widths, in a
    width that zeros cannot fill up without changing what a model computes, or if padding is not
    allowed. A specification that needs no units is returned as it is.
    """
    first = specifications[0]
    for specification, name in zip(specifications, names, strict=True):
        if [s.name for s in specification.symmetries] != [s.name for s in first.symmetries]:
            raise KarcherError(
                f"{names[0]} and {name} do not have the same layers: only models of one "
                "architecture can be aligned."
            )
    sizes = []
    for symmetries in zip(*(s.symmetries for s in specifications), strict=True):
        sizes.append(max(symmetry.size for symmetry in symmetries))
        if any(symmetry.size < sizes[-1] for symmetry in symmetries):
            which = ", ".join(f"{s.size} in {n}" for s, n in zip(symmetries, names, strict=True))
            if not symmetries[0].padding:
                raise KarcherError(
                    f"{symmetries[0].name} has {which} units: only plain MLPs can be padded with "
                    "zeros, so these models cannot be aligned."
                )
            if not allowed:
                raise KarcherError(
                    f"{symmetries[0].name} has {which} units: --pad fills the narrower ones up "
                    "with units that do nothing."
                )
    for specification, name in zip(specifications, names, strict=True):
        _check_same_moves(first, specification, f"{names[0]} and {name}")
    result = [_with_sizes(specification, sizes) for specification in specifications]
    _check_same_shapes(result, names)
    return result


def padded(model: Reader, narrow: Specification, wide: Specification) -> Reader:
    """Reads the tensors of a model with the units of zeros that make narrow its symmetries wide."""
    if wide is narrow:
        return model
    # For each tensor the axis, where its units end, and how many places are added there.
    insertions: dict[str, list[tuple[int, int, int]]] = {}
    for symmetry, target in zip(narrow.symmetries, wide.symmetries, strict=True):
        more = target.size - symmetry.size
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
            before, after = tensor.tensor_split([end], axis)
            tensor = torch.cat([before, filling, after], axis)
        return tensor

    return read


def _with_sizes(specification: Specification, sizes: Sequence[int]) -> Specification:
    if all(s.size == size for s, size in zip(specification.symmetries, sizes, strict=True)):
        return specification
    shapes = dict(specification.shapes)
    for symmetry, size in zip(specification.symmetries, sizes, strict=True):
        for tensor, axis, _, block in symmetry.moves:
            shape = list(shapes[tensor])
            shape[axis] += (size - symmetry.size) * block
            shapes[tensor] = tuple(shape)
    symmetries = (
        replace(symmetry, size=size)
        for symmetry, size in zip(specification.symmetries, sizes, strict=True)
    )
    return replace(specification, shapes=shapes, symmetries=tuple(symmetries))


def _check_same_moves(first: Specification, other: Specification, names: str) -> None:
    for ours, theirs in zip(first.symmetries, other.symmetries, strict=True):
        if (ours.moves, ours.inside) != (theirs.moves, theirs.inside):
            lacking = {m.tensor for m in ours.moves} ^ {m.tensor for m in theirs.moves}
            what = f"{ours.name} is built differently"
            if lacking:
                what = f"only one of them has {', '.join(sorted(lacking))}"
            raise KarcherError(f"{names} cannot be aligned with each other: {what}.")


def _check_same_shapes(specifications: Sequence[Specification], names: Sequence[str]) -> None:
    first = specifications[0]
    for tensor in sorted(first.tensors()):
        for specification, name in zip(specifications, names, strict=True):
            if specification.shapes[tensor] != first.shapes[tensor]:
                raise KarcherError(
                    f"{tensor} has shape {specification.shapes[tensor]} in {name}, but "
                    f"{first.shapes[tensor]} in {names[0]}: zeros in the residual stream would "
                    "change what its normalisation divides by, so only the widths of MLPs can "
                    "differ."
                )
