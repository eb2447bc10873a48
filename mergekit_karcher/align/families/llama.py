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
    family_specification,
    layers_of,
    moves_of_inputs,
    moves_of_outputs,
)

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")

_KNOWN = (
    r"(model\.embed_tokens|model\.norm|lm_head)\.weight|(.*\.)?rotary_emb\.inv_freq|"
    r"model\.layers\.(.*\.)?([^.]*_proj|[^.]*layernorm|q_norm|k_norm)\.(weight|bias)"
)


def specification(config: Mapping[str, Any], shapes: Shapes, residual: bool) -> Specification:
    """MLP neurons; key/value heads with their queries; query heads and values inside of those."""
    layers = layers_of(shapes, "model.layers.", "mlp.gate_proj.weight")
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    symmetries = [s for layer in layers for s in _layer(layer, shapes, heads, groups, width)]
    if residual:
        symmetries.append(_residual(shapes, layers, int(config["hidden_size"])))
    return family_specification("llama", shapes, symmetries, _KNOWN, residual, "intermediate_size")


def _layer(start: str, shapes: Shapes, heads: int, groups: int, width: int) -> Iterator[Symmetry]:
    gate, up = f"{start}mlp.gate_proj", f"{start}mlp.up_proj"
    yield Symmetry(
        f"{start}mlp",
        shapes[f"{gate}.weight"][0],
        (
            Move(f"{gate}.weight", 0),
            Move(f"{up}.weight", 0),
            Move(f"{start}mlp.down_proj.weight", 1),
            Move(f"{gate}.bias", 0),
            Move(f"{up}.bias", 0),
        ),
        padding=True,
        feeds=(f"{gate}.weight", f"{up}.weight"),
    )
    attention = f"{start}self_attn."
    queries = heads // groups
    blocks = {"q_proj": queries * width, "k_proj": width, "v_proj": width}
    moves = (
        *(Move(f"{attention}{name}.weight", 0, 0, block) for name, block in blocks.items()),
        Move(f"{attention}o_proj.weight", 1, 0, queries * width),
        *(Move(f"{attention}{name}.bias", 0, 0, block) for name, block in blocks.items()),
    )
    outputs = (InnerMove(3, query * width) for query in range(queries))
    inside = (
        Inside("query heads", queries, tuple(InnerMove(move, 0, width) for move in (0, 3, 4))),
        Inside("values", width, (InnerMove(2), *outputs, InnerMove(6))),
    )
    yield Symmetry(f"{attention}heads", groups, moves, inside)


def _residual(shapes: Shapes, layers: list[str], width: int) -> Symmetry:
    moves = [
        Move("model.embed_tokens.weight", 1),
        Move("model.norm.weight", 0),
        Move("lm_head.weight", 1),
    ]
    for start in layers:
        moves += moves_of_inputs(f"{start}self_attn.", "q_proj", "k_proj", "v_proj")
        moves += moves_of_inputs(start, "mlp.gate_proj", "mlp.up_proj")
        moves += moves_of_outputs(start, "mlp.down_proj", "self_attn.o_proj")
        moves += [
            Move(name, 0)
            for name, shape in shapes.items()
            if name.startswith(start) and name.endswith("layernorm.weight") and shape == (width,)
        ]
    return Symmetry("residual", width, tuple(moves))
