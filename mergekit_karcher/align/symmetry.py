"""What may be permuted in a network without changing what it computes, as data.

A symmetry has `size` units (neurons, heads) that may stand in any order, as long as every tensor
that has them follows: each of its moves is that many blocks, one after the other, along one axis
of one tensor. A unit may have symmetries inside of it, too (the dimensions of a head).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from mergekit_karcher.errors import KarcherError

Shapes = Mapping[str, tuple[int, ...]]


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


@dataclass(frozen=True)
class Specification:
    """The symmetries of one network, with the shapes of its tensors.

    fixed: the (tensor, axis) pairs that no symmetry moves, tensors as shell patterns. Every axis
        must be moved or fixed (or both, if a part of it moves), so that none is forgotten.
    width_key: the key of a model's config that says how many units a symmetry with padding has.

    Raises `KarcherError` when it is made unless sizes agree, blocks do not overlap, and every axis
    is moved or fixed.
    """

    family: str
    shapes: Shapes
    symmetries: tuple[Symmetry, ...]
    fixed: tuple[tuple[str, int], ...] = ()
    width_key: str | None = None

    def __post_init__(self) -> None:
        moved: dict[tuple[str, int], list[_Run]] = {}
        for symmetry in self.symmetries:
            _check_symmetry(symmetry, self.shapes, moved)
        _check_every_axis_is_known(self, moved)

    def tensors(self) -> set[str]:
        """The names of all tensors that any symmetry moves."""
        return {move.tensor for symmetry in self.symmetries for move in symmetry.moves}


def present(symmetry: Symmetry, shapes: Shapes) -> Symmetry:
    """A symmetry without moves of tensors that the network lacks, such as biases.

    Arguments:
        symmetry: Of a network with all tensors that its family may have.
        shapes: The tensors that the network has.

    Returns:
        A new symmetry, without those inside of its units that have no tensor or a single unit.
    """
    kept = [index for index, move in enumerate(symmetry.moves) if move.tensor in shapes]
    place = {index: new for new, index in enumerate(kept)}
    inside = tuple(
        replace(
            inner,
            moves=tuple(m._replace(move=place[m.move]) for m in inner.moves if m.move in place),
        )
        for inner in symmetry.inside
    )
    moves = tuple(symmetry.moves[index] for index in kept)
    return replace(symmetry, moves=moves, inside=tuple(i for i in inside if i.moves and i.size > 1))


def with_known_fixed(
    family: str,
    shapes: Shapes,
    symmetries: Sequence[Symmetry],
    is_known: Callable[[str], bool],
    width_key: str,
) -> Specification:
    """A specification that fixes every axis of known tensors that no symmetry moves.

    Arguments:
        family: The name of the family.
        shapes: Of all tensors.
        symmetries: What may be permuted.
        is_known: Whether a tensor of that name belongs to the family; others stop the alignment.
        width_key: See `Specification`.

    Raises:
        KarcherError: If the specification is not sound, see `Specification`.
    """
    moved = {(move.tensor, move.axis) for symmetry in symmetries for move in symmetry.moves}
    fixed = tuple(
        (name, axis)
        for name, shape in shapes.items()
        for axis in range(len(shape))
        if (name, axis) not in moved and is_known(name)
    )
    return Specification(family, shapes, tuple(symmetries), fixed, width_key)


class _Run(NamedTuple):
    """Places start to end - 1 of an axis, which the symmetry of that name moves."""

    start: int
    end: int
    name: str


def _check_symmetry(
    symmetry: Symmetry, shapes: Shapes, moved: dict[tuple[str, int], list[_Run]]
) -> None:
    """Check one symmetry, and add the runs that it moves to those of the others."""
    if symmetry.size < 1:
        raise KarcherError(f"Symmetry {symmetry.name} has {symmetry.size} units.")
    for move in symmetry.moves:
        shape = shapes.get(move.tensor)
        if shape is None:
            raise KarcherError(
                f"Symmetry {symmetry.name} moves {move.tensor}, which the models do not have."
            )
        if not 0 <= move.axis < len(shape):
            raise KarcherError(
                f"Symmetry {symmetry.name} moves axis {move.axis} of {move.tensor}, whose "
                f"shape is {tuple(shape)}."
            )
        end = move.offset + symmetry.size * move.block
        if move.offset < 0 or move.block < 1 or end > shape[move.axis]:
            raise KarcherError(
                f"Symmetry {symmetry.name} takes {symmetry.size} blocks of {move.block} from "
                f"{move.offset} on axis {move.axis} of {move.tensor}, which has "
                f"{shape[move.axis]}: the sizes do not agree."
            )
        runs = moved.setdefault((move.tensor, move.axis), [])
        for run in runs:
            if run.start < end and move.offset < run.end:
                raise KarcherError(
                    f"Symmetries {run.name} and {symmetry.name} both move the same part of axis "
                    f"{move.axis} of {move.tensor}."
                )
        runs.append(_Run(move.offset, end, symmetry.name))
    for inside in symmetry.inside:
        _check_inside(symmetry, inside)


def _check_inside(symmetry: Symmetry, inside: Inside) -> None:
    moved: dict[int, list[_Run]] = {}
    for move in inside.moves:
        if not 0 <= move.move < len(symmetry.moves):
            raise KarcherError(
                f"{inside.name} inside of {symmetry.name} refers to move {move.move}, which that "
                "does not have."
            )
        block = symmetry.moves[move.move].block
        end = move.offset + inside.size * move.block
        runs = moved.setdefault(move.move, [])
        if move.offset < 0 or move.block < 1 or end > block:
            raise KarcherError(
                f"{inside.name} takes {inside.size} blocks of {move.block} from {move.offset} "
                f"inside blocks of {block} of {symmetry.name}: the sizes do not agree."
            )
        if any(run.start < end and move.offset < run.end for run in runs):
            raise KarcherError(
                f"{inside.name} inside of {symmetry.name} moves the same part of a block twice."
            )
        runs.append(_Run(move.offset, end, inside.name))


def _check_every_axis_is_known(
    specification: Specification, moved: Mapping[tuple[str, int], Sequence[_Run]]
) -> None:
    for name, shape in specification.shapes.items():
        for axis, length in enumerate(shape):
            fixed = any(
                axis == fixed_axis and fnmatchcase(name, pattern)
                for pattern, fixed_axis in specification.fixed
            )
            count = sum(run.end - run.start for run in moved.get((name, axis), ()))
            if count < length and not fixed:
                part = f"{length - count} of {length} places on " if count else ""
                raise KarcherError(
                    f"Nothing is known of {part}axis {axis} of {name}: let a symmetry move it, or "
                    "list it as fixed."
                )


def layers_of(shapes: Shapes, template: str) -> list[int]:
    """The numbers of the layers that have a tensor of a certain name, in ascending order.

    Arguments:
        shapes: The tensors of a model.
        template: The name, with {layer} in the place of the number.
    """
    start, _, end = template.partition("{layer}")
    numbers = [
        name[len(start) : len(name) - len(end)]
        for name in shapes
        if name.startswith(start) and name.endswith(end)
    ]
    return sorted(int(text) for text in numbers if text.isdigit())


def components_of(symmetries: Sequence[Symmetry]) -> list[list[Symmetry]]:
    """The symmetries in groups, so that those of different groups share no tensor; in order."""
    groups: list[tuple[set[str], list[Symmetry]]] = []
    for symmetry in symmetries:
        names = {move.tensor for move in symmetry.moves}
        touching = [group for group in groups if group[0] & names]
        merged = (
            names.union(*(group[0] for group in touching)),
            [*(s for group in touching for s in group[1]), symmetry],
        )
        groups = [group for group in groups if group not in touching] + [merged]
    return [group for _, group in groups]
