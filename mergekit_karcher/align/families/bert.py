"""BERT: learned positions, biases everywhere, a pooler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_karcher.align.symmetry import (
    InnerMove,
    Inside,
    Move,
    Shapes,
    Specification,
    Symmetry,
    layers_of,
    present,
    with_known_fixed,
)

MODEL_TYPES = ("bert",)


def specification(config: Mapping[str, Any], shapes: Shapes, residual: bool) -> Specification:
    """MLP neurons, heads, and inside of each head queries with keys, and values."""
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in shapes else ""
    template = f"{prefix}encoder.layer.{{layer}}.intermediate.dense.weight"
    layers = layers_of(shapes, template)
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    symmetries = [
        present(symmetry, shapes)
        for layer in layers
        for symmetry in _layer(f"{prefix}encoder.layer.{layer}.", shapes, heads, width // heads)
    ]
    if residual:
        symmetries.append(present(_residual(prefix, layers, width, shapes), shapes))
    known = (
        *(f"{prefix}{part}." for part in ("embeddings", "encoder", "pooler")),
        "cls.",
        "classifier.",
        "qa_outputs.",
    )

    def is_known(name: str) -> bool:
        # Cross-attention reads another network, whose residual stream is not permuted.
        return name.startswith(known) and not (residual and "cross" in name)

    return with_known_fixed("bert", shapes, symmetries, is_known, "intermediate_size")


def _layer(start: str, shapes: Shapes, heads: int, block: int) -> Iterator[Symmetry]:
    yield Symmetry(
        f"{start}mlp",
        shapes[f"{start}intermediate.dense.weight"][0],
        (
            Move(f"{start}intermediate.dense.weight", 0),
            Move(f"{start}intermediate.dense.bias", 0),
            Move(f"{start}output.dense.weight", 1),
        ),
        padding=True,
        feeds=(f"{start}intermediate.dense.weight",),
    )
    attention = f"{start}attention."
    names = [f"{attention}self.{name}" for name in ("query", "key", "value")]
    moves = (
        *(Move(f"{name}.{part}", 0, 0, block) for name in names for part in ("weight", "bias")),
        Move(f"{attention}output.dense.weight", 1, 0, block),
    )
    inside = (
        Inside("queries and keys", block, tuple(InnerMove(move) for move in (0, 1, 2, 3))),
        Inside("values", block, tuple(InnerMove(move) for move in (4, 5, 6))),
    )
    yield Symmetry(f"{attention}heads", heads, moves, inside)


def _residual(prefix: str, layers: list[int], width: int, shapes: Shapes) -> Symmetry:
    embeddings, head = f"{prefix}embeddings.", "cls.predictions."
    pooled = f"{prefix}pooler.dense.weight" in shapes
    moves = [
        *(
            Move(f"{embeddings}{kind}_embeddings.weight", 1)
            for kind in ("word", "position", "token_type")
        ),
        *(Move(f"{embeddings}LayerNorm.{part}", 0) for part in ("weight", "bias")),
        Move(f"{prefix}pooler.dense.weight", 1),
        Move("qa_outputs.weight", 1),
        # The outputs of a pooler have an order that is not that of the residual stream.
        *(() if pooled else (Move("classifier.weight", 1),)),
        # The decoder is the word embedding: so what it reads has the order of that.
        *(Move(f"{head}transform.dense.weight", axis) for axis in (0, 1)),
        Move(f"{head}transform.dense.bias", 0),
        *(Move(f"{head}transform.LayerNorm.{part}", 0) for part in ("weight", "bias")),
        Move(f"{head}decoder.weight", 1),
    ]
    for layer in layers:
        start = f"{prefix}encoder.layer.{layer}."
        for name in ("query", "key", "value"):
            moves.append(Move(f"{start}attention.self.{name}.weight", 1))
        moves.append(Move(f"{start}intermediate.dense.weight", 1))
        for name in ("attention.output", "output"):
            moves += [Move(f"{start}{name}.dense.{part}", 0) for part in ("weight", "bias")]
            moves += [Move(f"{start}{name}.LayerNorm.{part}", 0) for part in ("weight", "bias")]
    return Symmetry("residual", width, tuple(moves))
