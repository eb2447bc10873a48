"""GPT-NeoX (Pythia): queries, keys and values of a head stand together; rotary embeddings."""

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

MODEL_TYPES = ("gpt_neox",)

# transformers has called the output layer by both names.
_HEADS = ("embed_out.", "lm_head.")


def specification(config: Mapping[str, Any], shapes: Shapes, residual: bool) -> Specification:
    """MLP neurons, heads, and the values inside of each head."""
    prefix = "gpt_neox." if "gpt_neox.embed_in.weight" in shapes else ""
    layers = layers_of(shapes, f"{prefix}layers.{{layer}}.input_layernorm.weight")
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    symmetries = [
        present(symmetry, shapes)
        for layer in layers
        for symmetry in _layer(f"{prefix}layers.{layer}.", shapes, heads, width // heads)
    ]
    if residual:
        symmetries.append(present(_residual(prefix, layers, width), shapes))
    known = (f"{prefix}embed_in.", f"{prefix}final_layer_norm.", f"{prefix}layers.", *_HEADS)

    def is_known(name: str) -> bool:
        # Cross-attention reads another network, whose residual stream is not permuted.
        return name.startswith(known) and not (residual and "cross" in name)

    return with_known_fixed("gpt_neox", shapes, symmetries, is_known, "intermediate_size")


def _layer(start: str, shapes: Shapes, heads: int, block: int) -> Iterator[Symmetry]:
    yield Symmetry(
        f"{start}mlp",
        shapes[f"{start}mlp.dense_h_to_4h.weight"][0],
        (
            Move(f"{start}mlp.dense_h_to_4h.weight", 0),
            Move(f"{start}mlp.dense_h_to_4h.bias", 0),
            Move(f"{start}mlp.dense_4h_to_h.weight", 1),
        ),
        padding=True,
        feeds=(f"{start}mlp.dense_h_to_4h.weight",),
    )
    attention = f"{start}attention."
    moves = (
        Move(f"{attention}query_key_value.weight", 0, 0, 3 * block),
        Move(f"{attention}query_key_value.bias", 0, 0, 3 * block),
        Move(f"{attention}dense.weight", 1, 0, block),
    )
    values = (InnerMove(0, 2 * block), InnerMove(1, 2 * block), InnerMove(2))
    yield Symmetry(f"{attention}heads", heads, moves, (Inside("values", block, values),))


def _residual(prefix: str, layers: list[int], width: int) -> Symmetry:
    moves = [
        Move(f"{prefix}embed_in.weight", 1),
        Move(f"{prefix}final_layer_norm.weight", 0),
        Move(f"{prefix}final_layer_norm.bias", 0),
        *(Move(f"{head}weight", 1) for head in _HEADS),
    ]
    for layer in layers:
        start = f"{prefix}layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            moves += [Move(f"{start}{name}.{part}", 0) for part in ("weight", "bias")]
        for name in ("attention.query_key_value", "mlp.dense_h_to_4h"):
            moves.append(Move(f"{start}{name}.weight", 1))
        for name in ("attention.dense", "mlp.dense_4h_to_h"):
            moves += [Move(f"{start}{name}.{part}", 0) for part in ("weight", "bias")]
    return Symmetry("residual", width, tuple(moves))
