"""Llama and what is built like it: gated MLP, grouped-query attention with rotary embeddings.

Rotary embeddings pair and turn the dimensions of queries and keys by their place inside a head, so
these must stay where they are; those of values and outputs are free.
"""

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

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")

_LAYER = "model.layers.{layer}."


def specification(config: Mapping[str, Any], shapes: Shapes, residual: bool) -> Specification:
    """MLP neurons; key/value heads with their queries; query heads and values inside of those."""
    layers = layers_of(shapes, f"{_LAYER}mlp.gate_proj.weight")
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    symmetries = [
        present(symmetry, shapes)
        for layer in layers
        for symmetry in _layer(_LAYER.format(layer=layer), shapes, heads, groups, width)
    ]
    if residual:
        symmetries.append(present(_residual(shapes, layers, int(config["hidden_size"])), shapes))
    return with_known_fixed("llama", shapes, symmetries, _is_known, "intermediate_size")


def _layer(start: str, shapes: Shapes, heads: int, groups: int, width: int) -> Iterator[Symmetry]:
    neurons = shapes[f"{start}mlp.gate_proj.weight"][0]
    yield Symmetry(
        f"{start}mlp",
        neurons,
        (
            Move(f"{start}mlp.gate_proj.weight", 0),
            Move(f"{start}mlp.up_proj.weight", 0),
            Move(f"{start}mlp.down_proj.weight", 1),
            Move(f"{start}mlp.gate_proj.bias", 0),
            Move(f"{start}mlp.up_proj.bias", 0),
        ),
        padding=True,
        feeds=(f"{start}mlp.gate_proj.weight", f"{start}mlp.up_proj.weight"),
    )
    attention = f"{start}self_attn."
    queries = heads // groups
    of_group = queries * width
    moves = (
        Move(f"{attention}q_proj.weight", 0, 0, of_group),
        Move(f"{attention}k_proj.weight", 0, 0, width),
        Move(f"{attention}v_proj.weight", 0, 0, width),
        Move(f"{attention}o_proj.weight", 1, 0, of_group),
        Move(f"{attention}q_proj.bias", 0, 0, of_group),
        Move(f"{attention}k_proj.bias", 0, 0, width),
        Move(f"{attention}v_proj.bias", 0, 0, width),
    )
    inside = (
        Inside(
            "query heads",
            queries,
            tuple(InnerMove(move, 0, width) for move in (0, 3, 4)),
        ),
        Inside(
            "values",
            width,
            (
                InnerMove(2),
                *(InnerMove(3, query * width) for query in range(queries)),
                InnerMove(6),
            ),
        ),
    )
    yield Symmetry(f"{attention}heads", groups, moves, inside)


def _residual(shapes: Shapes, layers: list[int], width: int) -> Symmetry:
    moves = [
        Move("model.embed_tokens.weight", 1),
        Move("model.norm.weight", 0),
        Move("lm_head.weight", 1),
    ]
    for layer in layers:
        start = _LAYER.format(layer=layer)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            moves.append(Move(f"{start}{name}.weight", 1))
        moves += [
            Move(f"{start}mlp.gate_proj.weight", 1),
            Move(f"{start}mlp.up_proj.weight", 1),
            Move(f"{start}mlp.down_proj.weight", 0),
            Move(f"{start}mlp.down_proj.bias", 0),
            Move(f"{start}self_attn.o_proj.weight", 0),
            Move(f"{start}self_attn.o_proj.bias", 0),
        ]
        moves += [
            Move(name, 0)
            for name, shape in shapes.items()
            if name.startswith(start) and name.endswith("layernorm.weight") and shape == (width,)
        ]
    return Symmetry("residual", width, tuple(moves))


def _is_known(name: str) -> bool:
    """Whether it is a tensor of this family, whatever a symmetry does with it."""
    if name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        return True
    *_, module, part = name.split(".")
    if (module, part) == ("rotary_emb", "inv_freq"):
        return True
    return (
        name.startswith("model.layers.")
        and part in ("weight", "bias")
        and (module.endswith(("_proj", "layernorm")) or module in ("q_norm", "k_norm"))
    )
