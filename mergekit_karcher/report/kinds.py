"""What kind of module a tensor belongs to, by its name, and in which layer."""

from __future__ import annotations

import re

# The first pattern that matches decides. Families have similar names for what does the same.
_PATTERNS = (
    (r"lm_head|embed_out|score\.|classifier|^output\.weight", "head"),
    (r"embed_tokens|\bwte\b|\bwpe\b|embed_in|embeddings|tok_emb", "embeddings"),
    (r"norm|\bln_|\bln\d|LayerNorm", "norms"),
    (r"router|mlp\.gate\.|block_sparse_moe\.gate\.", "router"),
    (r"qkv_proj|query_key_value|c_attn|\bqkv\b|Wqkv", "qkv"),
    (r"q_proj|\bquery\b|\bwq\b", "q"),
    (r"k_proj|\bkey\b|\bwk\b", "k"),
    (r"v_proj|\bvalue\b|\bwv\b", "v"),
    (r"o_proj|out_proj|\bwo\b|attn\.c_proj|attention\.(dense|output\.dense)", "o"),
    (r"gate_up_proj", "gate and up"),
    (r"gate_proj|\bw1\b", "gate"),
    (r"up_proj|\bw3\b|c_fc|dense_h_to_4h|intermediate\.dense", "up"),
    (r"down_proj|\bw2\b|mlp\.c_proj|dense_4h_to_h|output\.dense", "down"),
)

ORDER = (*dict.fromkeys(kind for _, kind in _PATTERNS), "biases", "other")


def kind_of(name: str) -> str:
    """The kind of module that a tensor belongs to, one of ORDER."""
    kind = next((kind for pattern, kind in _PATTERNS if re.search(pattern, name)), "other")
    return "biases" if name.endswith(".bias") and kind not in ("norms", "other") else kind


def layer_of(name: str) -> int | None:
    """The first number in the name of a tensor; None for those outside the layers."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else None
