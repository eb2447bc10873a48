"""A specification of symmetries that a user wrote, in YAML."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_karcher.align.symmetry import (
    InnerMove,
    Inside,
    Move,
    Shapes,
    Specification,
    Symmetry,
)
from mergekit_karcher.errors import KarcherError


def read(path: Path, shapes: Shapes) -> Specification:
    """Read a specification from a file.

    Arguments:
        path: In YAML, see `from_document`.
        shapes: Of the tensors of the model that it is for.

    Raises:
        KarcherError: If the file is not valid YAML, or does not fit the model.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise KarcherError(f"{path} is not valid YAML: {where}.") from None
    return from_document(document, shapes)


def from_document(document: Any, shapes: Shapes) -> Specification:
    """The specification that a document describes.

    Arguments:
        document: A mapping. symmetries: a list of {name, size, moves, inside, feeds, layers};
            moves of {tensor, axis, offset, block}, those of inside of {move, offset, block}. With
            layers: N a symmetry stands for N symmetries, with the numbers from 0 on in the place
            of {layer} in its names. fixed: a list of {tensor, axis}, tensors as shell patterns.
        shapes: Of the tensors of the model that it is for.

    Raises:
        KarcherError: If the document has another form, or does not fit the model.
    """
    try:
        symmetries = tuple(_symmetries(document["symmetries"]))
        fixed = tuple((str(f["tensor"]), int(f["axis"])) for f in document.get("fixed", ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KarcherError(
            f"The specification is not one ({type(error).__name__}: {error}): it needs symmetries "
            "with name, size and moves of tensor and axis."
        ) from None
    return Specification("specification", shapes, symmetries, fixed)


def _symmetries(entries: Iterable[Mapping[str, Any]]) -> Iterator[Symmetry]:
    for entry in entries:
        _check_keys(entry, ("name", "size", "moves", "inside", "feeds", "layers"))
        if "layers" not in entry:
            yield _symmetry(entry, None)
        else:
            yield from (_symmetry(entry, layer) for layer in range(int(entry["layers"])))


def _symmetry(entry: Mapping[str, Any], layer: int | None) -> Symmetry:
    """One symmetry, with the number of a layer in its names."""

    def named(text: Any) -> str:
        return str(text) if layer is None else str(text).replace("{layer}", str(layer))

    return Symmetry(
        named(entry["name"]),
        int(entry["size"]),
        tuple(_move(move, named(move["tensor"])) for move in entry["moves"]),
        tuple(map(_inside, entry.get("inside", ()))),
        feeds=tuple(map(named, entry.get("feeds", ()))),
    )


def _move(move: Mapping[str, Any], tensor: str) -> Move:
    _check_keys(move, ("tensor", "axis", "offset", "block"))
    return Move(tensor, int(move["axis"]), int(move.get("offset", 0)), int(move.get("block", 1)))


def _inside(entry: Mapping[str, Any]) -> Inside:
    _check_keys(entry, ("name", "size", "moves"))
    return Inside(str(entry["name"]), int(entry["size"]), tuple(map(_inner_move, entry["moves"])))


def _inner_move(move: Mapping[str, Any]) -> InnerMove:
    _check_keys(move, ("move", "offset", "block"))
    return InnerMove(int(move["move"]), int(move.get("offset", 0)), int(move.get("block", 1)))


def _check_keys(part: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in part:
        if key not in known:
            raise KarcherError(
                f"The specification has {key!r} where only {', '.join(known)} can stand."
            )
