"""A specification of symmetries that a user wrote, in YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_karcher.align.symmetry import InnerMove, Inside, Move, Shapes, Specification, Symmetry
from mergekit_karcher.errors import KarcherError


def read(path: Path, shapes: Shapes) -> Specification:
    """Read the specification of a model with those shapes; raises `KarcherError` if it is none."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise KarcherError(f"{path} is not valid YAML: {where}.") from None
    return from_document(document, shapes)


def from_document(document: Any, shapes: Shapes) -> Specification:
    """The specification that a mapping describes; raises `KarcherError` if it does not fit.

    symmetries: a list of {name, size, moves, inside, feeds, layers}; moves of {tensor, axis,
        offset, block}, those of inside of {move, offset, block}. With layers: N a symmetry stands
        for N symmetries, with the numbers from 0 on in the place of {layer} in its names.
    fixed: a list of {tensor, axis}, tensors as shell patterns.
    """
    try:
        symmetries = tuple(s for entry in document["symmetries"] for s in _symmetries(entry))
        fixed = tuple((str(f["tensor"]), int(f["axis"])) for f in document.get("fixed", ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KarcherError(
            f"The specification is not one ({type(error).__name__}: {error}): it needs symmetries "
            "with name, size and moves of tensor and axis."
        ) from None
    return Specification("specification", shapes, symmetries, fixed)


def _symmetries(entry: Mapping[str, Any]) -> Iterator[Symmetry]:
    _check_keys(entry, ("name", "size", "moves", "inside", "feeds", "layers"))
    layers: Sequence[int | None] = range(int(entry["layers"])) if "layers" in entry else (None,)
    for layer in layers:

        def named(text: Any, layer: int | None = layer) -> str:
            return str(text) if layer is None else str(text).replace("{layer}", str(layer))

        yield Symmetry(
            named(entry["name"]),
            int(entry["size"]),
            tuple(_move(move, named(move["tensor"])) for move in entry["moves"]),
            tuple(map(_inside, entry.get("inside", ()))),
            feeds=tuple(map(named, entry.get("feeds", ()))),
        )


def _move(move: Mapping[str, Any], tensor: str) -> Move:
    _check_keys(move, Move._fields)
    return Move(tensor, int(move["axis"]), int(move.get("offset", 0)), int(move.get("block", 1)))


def _inside(entry: Mapping[str, Any]) -> Inside:
    _check_keys(entry, ("name", "size", "moves"))
    return Inside(str(entry["name"]), int(entry["size"]), tuple(map(_inner_move, entry["moves"])))


def _inner_move(move: Mapping[str, Any]) -> InnerMove:
    _check_keys(move, InnerMove._fields)
    return InnerMove(int(move["move"]), int(move.get("offset", 0)), int(move.get("block", 1)))


def _check_keys(part: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in part:
        if key not in known:
            raise KarcherError(
                f"The specification has {key!r} where only {', '.join(known)} can stand."
            )
