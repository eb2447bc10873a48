"""Kinds and layers by the names of tensors, and names for models."""

from __future__ import annotations

import pytest

from mergekit_karcher.report.kinds import kind_of, layer_of
from mergekit_karcher.report.names import is_local, short_names


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "q", 11),
        ("model.layers.0.self_attn.q_norm.weight", "norms", 0),
        ("model.layers.3.mlp.gate_proj.weight", "gate", 3),
        ("model.layers.3.mlp.experts.7.down_proj.weight", "down", 3),
        ("model.layers.3.block_sparse_moe.gate.weight", "router", 3),
        ("model.layers.3.block_sparse_moe.experts.1.w1.weight", "gate", 3),
        ("model.layers.2.self_attn.k_proj.bias", "biases", 2),
        ("model.embed_tokens.weight", "embeddings", None),
        ("lm_head.weight", "head", None),
        ("model.norm.weight", "norms", None),
        ("transformer.h.4.attn.c_attn.weight", "qkv", 4),
        ("transformer.h.4.attn.c_proj.weight", "o", 4),
        ("transformer.h.4.mlp.c_proj.weight", "down", 4),
        ("transformer.wte.weight", "embeddings", None),
        ("transformer.h.4.ln_1.bias", "norms", 4),
        ("gpt_neox.layers.5.attention.query_key_value.weight", "qkv", 5),
        ("gpt_neox.layers.5.attention.dense.weight", "o", 5),
        ("gpt_neox.layers.5.mlp.dense_4h_to_h.weight", "down", 5),
        ("bert.encoder.layer.1.attention.self.query.weight", "q", 1),
        ("bert.encoder.layer.1.attention.output.dense.weight", "o", 1),
        ("bert.encoder.layer.1.intermediate.dense.weight", "up", 1),
        ("bert.encoder.layer.1.output.dense.weight", "down", 1),
        ("0.weight", "other", 0),
    ],
)
def test_kinds_and_layers(name, kind, layer):
    assert kind_of(name) == kind
    assert layer_of(name) == layer


def test_names_show_no_place_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    paths = ["/data/a/last", "/data/b/last", "me/tuned", "runs/mine", "me/tuned+/x/adapter", "./z"]
    paths.append("gone/since/then")
    assert short_names(paths, is_local) == {
        "/data/a/last": "a/last",
        "/data/b/last": "b/last",
        "me/tuned": "me/tuned",
        "runs/mine": "mine",
        "me/tuned+/x/adapter": "me/tuned+adapter",
        "./z": "z",
        "gone/since/then": "then",
    }
