"""What may be permuted in a network without changing what it computes, as data.

A symmetry has `size` units (neurons, heads) that may stand in any order, as long as every tensor
that has them follows. A unit may have symmetries inside of it, too (the dimensions of a head).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import NamedTuple

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.headers import is_constant

Shapes = Mapping[str, tuple[int, ...]]
# For each (tensor, axis) the parts that are moved: start, end, and the symmetry that moves them.
_Moved = dict[tuple[str, int], list[tuple[int, int, str]]]


class Move(NamedTuple):
    """Blocks along an axis of a tensor: unit u is at offset + u * block ... + block - 1."""

    tensor: str
    axis: int
    offset: int = 0
    block: int = 1


class InnerMove(NamedTuple):
    """Blocks inside each block of a move of the outer symmetry.

    move: the index of that move. offset: from the start of its block.
    """

    move: int
    offset: int = 0
    block: int = 1


@dataclass(frozen=True)
class Inside:
    """A symmetry inside every unit of another symmetry."""

    name: str
    size: int
    moves: tuple[InnerMove, ...]


@dataclass(frozen=True)
class Symmetry:
    """Units that may stand in any order.

    padding: whether units of zeros change nothing, so that a narrower model may get some.
    feeds: the weights whose outputs are the pre-activations of the units, for `repair`.
    """

    name: str
    size: int
    moves: tuple[Move, ...]
    inside: tuple[Inside, ...] = ()
    padding: bool = False
    feeds: tuple[str, ...] = ()


class Joined(NamedTuple):
    """Tensors of one shape that moves see as one, side by side along an axis: a layer's experts."""

    parts: tuple[str, ...]
    axis: int


@dataclass(frozen=True)
class Specification:
    """The symmetries of one network, with the shapes of its tensors.

    fixed: the (tensor, axis) pairs that no symmetry moves, tensors as shell patterns. Every axis
        must be moved or fixed (or both, if a part of it moves), so that none is forgotten.
    width_key: the key of a model's config that says how many units a symmetry with padding has.
    joined: the tensors that stand in shapes and moves in the place of their parts.

    Raises `KarcherError` when it is made unless sizes agree, blocks do not overlap, and every axis
    is moved or fixed.
    """

    family: str
    shapes: Shapes
    symmetries: tuple[Symmetry, ...]
    fixed: tuple[tuple[str, int], ...] = ()
    width_key: str | None = None
    joined: Mapping[str, Joined] = field(default_factory=dict)

    def __post_init__(self) -> None:
        moved: _Moved = {}
        for symmetry in self.symmetries:
            _check_moves(symmetry, self.shapes, moved)
            for inside in symmetry.inside:
                _check_inside(symmetry, inside)
        _check_every_axis_is_known(self, moved)

    def tensors(self) -> set[str]:
        """The names of all tensors that any symmetry moves."""
        return {move.tensor for symmetry in self.symmetries for move in symmetry.moves}

    def parts_of(self, name: str) -> tuple[str, ...]:
        """The checkpoint's tensors that a tensor of the moves stands for; most often itself."""
        return self.joined[name].parts if name in self.joined else (name,)

    @cached_property
    def places(self) -> dict[str, tuple[str, int]]:
        """For each part of a joined tensor: the name of that, and which part of it this is."""
        return {
            part: (name, place)
            for name, joined in self.joined.items()
            for place, part in enumerate(joined.parts)
        }


def moves_of_outputs(start: str, *layers: str, block: int = 1) -> list[Move]:
    """What permuting the outputs of layers moves: the first axis of their weights and biases."""
    names = [f"{start}{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    return [Move(name, 0, 0, block) for name in names]


def moves_of_inputs(start: str, *layers: str) -> list[Move]:
    """What permuting the inputs of layers moves: the second axis of their weights."""
    return [Move(f"{start}{layer}.weight", 1) for layer in layers]


def family_specification(
    family: str,
    shapes: Shapes,
    symmetries: Iterable[Symmetry],
    known: str,
    residual: bool,
    width_key: str,
    joined: Mapping[str, Joined] | None = None,
) -> Specification:
    """The specification of a model of a family.

    symmetries: those of a model with all tensors that the family may have, such as biases.
    known: matches the names of the family's tensors; their axes that nothing moves are fixed, and
        any other tensor raises `KarcherError`. Buffers of constants are known in any family.
    """
    present = tuple(_present(symmetry, shapes) for symmetry in symmetries)
    moved = {(move.tensor, move.axis) for symmetry in present for move in symmetry.moves}
    strange = [n for n in shapes if not (re.fullmatch(known, n) or is_constant(n, shapes[n]))]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise KarcherError(
            f"Align does not know {strange[0]}{more} in a model of the type {family}, so it cannot "
            "tell what depends on the order of its units: describe the network by --spec, or leave "
            "that tensor out of the file."
        )
    fixed = tuple(
        (name, axis)
        for name, shape in shapes.items()
        # Cross-attention reads another network, whose residual stream is not permuted.
        if is_constant(name, shape) or not (residual and "cross" in name)
        for axis in range(len(shape))
        if (name, axis) not in moved
    )
    return Specification(family, shapes, present, fixed, width_key, joined or {})


def _present(symmetry: Symmetry, shapes: Shapes) -> Symmetry:
    """A symmetry without tensors that the network lacks, and without what is single inside."""
    kept = [index for index, move in enumerate(symmetry.moves) if move.tensor in shapes]
    place = {index: new for new, index in enumerate(kept)}
    inside = (
        replace(i, moves=tuple(m._replace(move=place[m.move]) for m in i.moves if m.move in place))
        for i in symmetry.inside
        if i.size > 1
    )
    moves = tuple(symmetry.moves[index] for index in kept)
    return replace(symmetry, moves=moves, inside=tuple(i for i in inside if i.moves))


def _check_moves(symmetry: Symmetry, shapes: Shapes, moved: _Moved) -> None:
    """Check the moves of a symmetry, and add them to those of the others."""
    name, size = symmetry.name, symmetry.size
    if size < 1:
        raise KarcherError(f"Symmetry {name} has {size} units.")
    for tensor, axis, offset, block in symmetry.moves:
        shape = shapes.get(tensor)
        if shape is None:
            raise KarcherError(f"Symmetry {name} moves {tensor}, which the models do not have.")
        if not 0 <= axis < len(shape):
            raise KarcherError(
                f"Symmetry {name} moves axis {axis} of {tensor}, whose shape is {tuple(shape)}."
            )
        end = offset + size * block
        if offset < 0 or block < 1 or end > shape[axis]:
            raise KarcherError(
                f"Symmetry {name} takes {size} blocks of {block} from {offset} on axis {axis} of "
                f"{tensor}, which has {shape[axis]}: the sizes do not agree."
            )
        parts = moved.setdefault((tensor, axis), [])
        for start, stop, other in parts:
            if start < end and offset < stop:
                raise KarcherError(
                    f"Symmetries {other} and {name} both move the same part of axis {axis} of "
                    f"{tensor}."
                )
        parts.append((offset, end, name))


def _check_inside(symmetry: Symmetry, inside: Inside) -> None:
    name, size = inside.name, inside.size
    moved: dict[int, list[tuple[int, int]]] = {}
    for index, offset, block in inside.moves:
        if not 0 <= index < len(symmetry.moves):
            raise KarcherError(
                f"{name} inside of {symmetry.name} refers to move {index}, which that does not "
                "have."
            )
        outer = symmetry.moves[index].block
        end = offset + size * block
        if offset < 0 or block < 1 or end > outer:
            raise KarcherError(
                f"{name} takes {size} blocks of {block} from {offset} inside blocks of {outer} of "
                f"{symmetry.name}: the sizes do not agree."
            )
        parts = moved.setdefault(index, [])
        if any(start < end and offset < stop for start, stop in parts):
            raise KarcherError(
                f"{name} inside of {symmetry.name} moves the same part of a block twice."
            )
        parts.append((offset, end))


def _check_every_axis_is_known(specification: Specification, moved: _Moved) -> None:
    for name, shape in specification.shapes.items():
        fixed = {axis for pattern, axis in specification.fixed if fnmatchcase(name, pattern)}
        for axis, length in enumerate(shape):
            count = sum(end - start for start, end, _ in moved.get((name, axis), ()))
            if count < length and axis not in fixed:
                part = f"{length - count} of {length} places on " if count else ""
                raise KarcherError(
                    f"Nothing is known of {part}axis {axis} of {name}: let a symmetry move it, or "
                    "list it as fixed."
                )


def layers_of(shapes: Shapes, start: str, end: str) -> list[str]:
    """What the names of each layer's tensors begin with, by ascending numbers: start, number, dot.

    Only layers that have a tensor whose name goes on with end.
    """
    names = (name for name in shapes if name.startswith(start) and name.endswith(f".{end}"))
    numbers = (name[len(start) : -len(end) - 1] for name in names)
    return [f"{start}{n}." for n in sorted(int(text) for text in numbers if text.isdigit())]


def components_of(symmetries: Sequence[Symmetry]) -> list[list[Symmetry]]:
    """The symmetries in groups, so that those of different groups share no tensor; in order."""
    groups: list[tuple[set[str], list[Symmetry]]] = []
    for symmetry in symmetries:
        names = {move.tensor for move in symmetry.moves}
        touching = [group for group in groups if group[0] & names]
        merged = [*(s for _, group in touching for s in group), symmetry]
        groups = [group for group in groups if group not in touching]
        groups.append((names.union(*(touched for touched, _ in touching)), merged))
    return [group for _, group in groups]
