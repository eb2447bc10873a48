"""Llama and what is built like it: gated MLP, grouped-query attention with rotary embeddings.

Rotary embeddings pair and turn the dimensions of queries and keys by their place inside a head, so
these must stay where they are; those of values and outputs are free. Phi-3 has queries, keys and
values in one tensor, one after the other, and gate and up in another. In mixtures of experts the
MLP of a layer is that of `experts`, and there may be a shared expert beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_karcher.align.families.experts import experts, joined_experts
from mergekit_karcher.align.families.heads import KNOWN_HEADS, moves_of_heads
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

MODEL_TYPES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
)

_LAYER = (
    r"layers\.\d+\.((self_attn\.(q|k|v|o|qkv)_proj|self_attn\.[qk]_norm|[a-z_]+_layernorm"
    r"|mlp\.((shared_expert|experts)\.)?(gate|up|down|gate_up)_proj|mlp\.(shared_expert_)?gate"
    r"|block_sparse_moe\.(gate|experts\.w[123]))\.(weight|bias))"
)


def specification(config: Mapping[str, Any], shapes: Shapes, residual: bool) -> Specification:
    """MLP neurons; key/value heads with their queries; query heads and values inside of those."""
    # A bare model has no prefix, and one that answers questions another than the rest.
    starts = ("model.", "transformer.", "")
    prefix = next((p for p in starts if f"{p}embed_tokens.weight" in shapes), "model.")
    shapes, joined = joined_experts(shapes)
    layers = layers_of(shapes, f"{prefix}layers.", "self_attn.o_proj.weight")
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    symmetries: list[Symmetry] = []
    for layer in layers:
        symmetries += _mlps(layer, shapes, padding=not joined)
        symmetries.append(_heads(f"{layer}self_attn.", shapes, heads, groups, width))
    if residual:
        symmetries.append(_residual(prefix, shapes, layers, int(config["hidden_size"])))
    known = rf"{prefix}((embed_tokens|norm)\.weight|{_LAYER})|{KNOWN_HEADS}"
    return family_specification(
        str(config["model_type"]), shapes, symmetries, known, residual, "intermediate_size", joined
    )


def _mlps(start: str, shapes: Shapes, padding: bool) -> Iterator[Symmetry]:
    """What stands between the attention of a layer and the next: an MLP, experts, or both."""
    mixture = list(experts(start, shapes))
    yield from mixture
    if f"{start}mlp.gate_up_proj.weight" in shapes:
        yield _fused_mlp(f"{start}mlp.", shapes)
    elif not mixture:
        yield _mlp(f"{start}mlp.", shapes, padding)
    elif f"{start}mlp.shared_expert.down_proj.weight" in shapes:
        yield _mlp(f"{start}mlp.shared_expert.", shapes, padding)


def _mlp(start: str, shapes: Shapes, padding: bool) -> Symmetry:
    gate, up = f"{start}gate_proj", f"{start}up_proj"
    return Symmetry(
        start.removesuffix("."),
        shapes[f"{gate}.weight"][0],
        (
            Move(f"{gate}.weight", 0),
            Move(f"{up}.weight", 0),
            Move(f"{start}down_proj.weight", 1),
            Move(f"{gate}.bias", 0),
            Move(f"{up}.bias", 0),
        ),
        padding=padding,
        feeds=(f"{gate}.weight", f"{up}.weight"),
    )


def _fused_mlp(start: str, shapes: Shapes) -> Symmetry:
    """An MLP whose gate and up are one tensor, gate first."""
    fused = f"{start}gate_up_proj.weight"
    size = shapes[fused][0] // 2
    moves = (Move(fused, 0), Move(fused, 0, size), Move(f"{start}down_proj.weight", 1))
    return Symmetry(start.removesuffix("."), size, moves, feeds=(fused,))


def _heads(start: str, shapes: Shapes, heads: int, groups: int, width: int) -> Symmetry:
    queries = heads // groups
    blocks = {"q_proj": queries * width, "k_proj": width, "v_proj": width}
    inputs = [Move(f"{start}{name}.weight", 0, 0, block) for name, block in blocks.items()]
    fused = f"{start}qkv_proj.weight"
    if fused in shapes:
        offsets = (0, heads * width, (heads + groups) * width)
        inputs = [
            Move(fused, 0, offset, block)
            for offset, block in zip(offsets, blocks.values(), strict=True)
        ]
    moves = (
        *inputs,
        Move(f"{start}o_proj.weight", 1, 0, queries * width),
        *(Move(f"{start}{name}.bias", 0, 0, block) for name, block in blocks.items()),
    )
    values = (InnerMove(3, query * width) for query in range(queries))
    inside = (
        Inside("query heads", queries, tuple(InnerMove(move, 0, width) for move in (0, 3, 4))),
        Inside("values", width, (InnerMove(2), *values, InnerMove(6))),
    )
    return Symmetry(f"{start}heads", groups, moves, inside)


def _residual(prefix: str, shapes: Shapes, layers: list[str], width: int) -> Symmetry:
    moves = [Move(f"{prefix}embed_tokens.weight", 1), Move(f"{prefix}norm.weight", 0)]
    moves += moves_of_heads()
    for start in layers:
        moves += moves_of_inputs(f"{start}self_attn.", "q_proj", "k_proj", "v_proj", "qkv_proj")
        for mlp in ("", "shared_expert.", "experts."):
            moves += moves_of_inputs(f"{start}mlp.{mlp}", "gate_proj", "up_proj", "gate_up_proj")
            moves += moves_of_outputs(f"{start}mlp.{mlp}", "down_proj")
        moves += moves_of_inputs(f"{start}mlp.", "gate", "shared_expert_gate")
        moves += moves_of_inputs(f"{start}block_sparse_moe.", "gate", "experts.w1", "experts.w3")
        moves += moves_of_outputs(start, "self_attn.o_proj", "block_sparse_moe.experts.w2")
        moves += [
            Move(name, 0)
            for name, shape in shapes.items()
            if name.startswith(start) and name.endswith("layernorm.weight") and shape == (width,)
        ]
    return Symmetry("residual", width, tuple(moves))
