"""What may be permuted in a network without changing what it computes, as data.

A symmetry has `size` units (neurons, heads) that may stand in any order, as long as every tensor
that knows them follows: each of its moves is a run of that many blocks along one axis of one
tensor. Units may have symmetries of their own inside (the dimensions inside a head).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from mergekit_karcher.errors import KarcherError

Shapes = Mapping[str, tuple[int, ...]]


class Move(NamedTuple):
    """Blocks along an axis of a tensor: unit u is at offset + u * block ... + block - 1."""

    tensor: str
    axis: int
    offset: int = 0
    block: int = 1


class InnerMove(NamedTuple):
    """Blocks inside those of a move: move counts those of the outer symmetry, offset from there."""

    move: int
    offset: int = 0
    block: int = 1


@dataclass(frozen=True)
class Inside:
    """A symmetry inside every unit of another one, the same in each."""

    name: str
    size: int
    moves: tuple[InnerMove, ...]


@dataclass(frozen=True)
class Symmetry:
    """Units that may stand in any order.

    padding: whether units of zeros change nothing, so that a model with fewer may get some.
    feeds: the weights whose outputs are the units' pre-activations, for the repair.
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

    fixed: (tensor, axis) pairs, by shell patterns of names, that no symmetry moves: every axis must
    be one or the other (or both, if it is moved in part), so that what was forgotten is noticed.
    width_key: where the config of a model says how many units its padded symmetries have. Raises
    `KarcherError` when built unless sizes agree, blocks do not overlap, and every axis is known.
    """

    family: str
    shapes: Shapes
    symmetries: tuple[Symmetry, ...]
    fixed: tuple[tuple[str, int], ...] = ()
    width_key: str | None = None

    def __post_init__(self) -> None:
        _validate(self)

    def tensors(self) -> set[str]:
        """Those that any symmetry moves."""
        return {move.tensor for symmetry in self.symmetries for move in symmetry.moves}


def present(symmetry: Symmetry, shapes: Shapes) -> Symmetry:
    """The symmetry without moves of tensors that a network lacks, such as biases."""
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
    """A specification of tensors that a family knows: what no symmetry moves of them is fixed."""
    moved = {(move.tensor, move.axis) for symmetry in symmetries for move in symmetry.moves}
    fixed = tuple(
        (name, axis)
        for name, shape in shapes.items()
        for axis in range(len(shape))
        if (name, axis) not in moved and is_known(name)
    )
    return Specification(family, shapes, tuple(symmetries), fixed, width_key)


def from_yaml(document: Any, shapes: Shapes) -> Specification:
    """A user's specification.

    symmetries: a list of {name, size, moves, inside, feeds, layers}; moves of {tensor,
    axis, offset, block}, those of inside of {move, offset, block}. With layers: N a symmetry
    stands for N, with {layer} in its names from 0 on. fixed: a list of {tensor, axis}, tensors as
    patterns.
    """
    try:
        symmetries = tuple(_expanded(document["symmetries"]))
        fixed = tuple((str(f["tensor"]), int(f["axis"])) for f in document.get("fixed", ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KarcherError(
            f"The specification is not one ({type(error).__name__}: {error}): it needs symmetries "
            "with name, size and moves of tensor and axis."
        ) from None
    return Specification("specification", shapes, symmetries, fixed)


def _expanded(entries: Iterable[Mapping[str, Any]]) -> Iterator[Symmetry]:
    for entry in entries:
        _known_keys(entry, ("name", "size", "moves", "inside", "feeds", "layers"))
        for move in entry["moves"]:
            _known_keys(move, ("tensor", "axis", "offset", "block"))
        for inner in entry.get("inside", ()):
            _known_keys(inner, ("name", "size", "moves"))
            for move in inner["moves"]:
                _known_keys(move, ("move", "offset", "block"))
        layers = range(int(entry["layers"])) if "layers" in entry else (None,)
        for layer in layers:

            def named(text: Any, layer: int | None = layer) -> str:
                return str(text) if layer is None else str(text).replace("{layer}", str(layer))

            yield Symmetry(
                named(entry["name"]),
                int(entry["size"]),
                tuple(
                    Move(
                        named(move["tensor"]),
                        int(move["axis"]),
                        int(move.get("offset", 0)),
                        int(move.get("block", 1)),
                    )
                    for move in entry["moves"]
                ),
                tuple(
                    Inside(
                        str(inner["name"]),
                        int(inner["size"]),
                        tuple(
                            InnerMove(
                                int(move["move"]),
                                int(move.get("offset", 0)),
                                int(move.get("block", 1)),
                            )
                            for move in inner["moves"]
                        ),
                    )
                    for inner in entry.get("inside", ())
                ),
                False,
                tuple(named(name) for name in entry.get("feeds", ())),
            )


def _known_keys(part: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in part:
        if key not in known:
            raise KarcherError(
                f"The specification has {key!r} where only {', '.join(known)} can stand."
            )


def _validate(specification: Specification) -> None:
    shapes = specification.shapes
    taken: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
    for symmetry in specification.symmetries:
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
            runs = taken.setdefault((move.tensor, move.axis), [])
            for start, stop, other in runs:
                if start < end and move.offset < stop:
                    raise KarcherError(
                        f"Symmetries {other} and {symmetry.name} both move the same part of axis "
                        f"{move.axis} of {move.tensor}."
                    )
            runs.append((move.offset, end, symmetry.name))
        for inner in symmetry.inside:
            _validate_inside(symmetry, inner)
    for name, shape in shapes.items():
        for axis in range(len(shape)):
            fixed = any(
                axis == place and fnmatchcase(name, pattern)
                for pattern, place in specification.fixed
            )
            moved = sum(stop - start for start, stop, _ in taken.get((name, axis), ()))
            if moved < shape[axis] and not fixed:
                what = f"{shape[axis] - moved} of {shape[axis]} places on " if moved else ""
                raise KarcherError(
                    f"Nothing is known of {what}axis {axis} of {name}: let a symmetry move it, or "
                    "list it as fixed."
                )


def _validate_inside(symmetry: Symmetry, inner: Inside) -> None:
    taken: dict[int, list[tuple[int, int]]] = {}
    for move in inner.moves:
        if not 0 <= move.move < len(symmetry.moves):
            raise KarcherError(
                f"{inner.name} inside of {symmetry.name} refers to move {move.move}, which that "
                "does not have."
            )
        block = symmetry.moves[move.move].block
        end = move.offset + inner.size * move.block
        runs = taken.setdefault(move.move, [])
        if move.offset < 0 or move.block < 1 or end > block:
            raise KarcherError(
                f"{inner.name} takes {inner.size} blocks of {move.block} from {move.offset} inside "
                f"blocks of {block} of {symmetry.name}: the sizes do not agree."
            )
        if any(start < end and move.offset < stop for start, stop in runs):
            raise KarcherError(
                f"{inner.name} inside of {symmetry.name} moves the same part of a block twice."
            )
        runs.append((move.offset, end))


def layers_of(shapes: Shapes, template: str) -> list[int]:
    """The layers for which a tensor of that name exists, {layer} standing for the number."""
    start, _, end = template.partition("{layer}")
    found = [
        name[len(start) : len(name) - len(end)]
        for name in shapes
        if name.startswith(start) and name.endswith(end)
    ]
    return sorted(int(text) for text in found if text.isdigit())


def components_of(symmetries: Sequence[Symmetry]) -> list[list[Symmetry]]:
    """The symmetries in groups that share no tensor, in order."""
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
