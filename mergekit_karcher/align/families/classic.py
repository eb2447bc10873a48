"""Families with an MLP of two layers, biases, and no groups of heads: GPT-2, GPT-NeoX, BERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def gpt2(config: Mapping[str, Any], shapes: Shapes, residual: bool) -> Specification:
    """MLP neurons, heads, and inside of each head queries with keys, and values.

    Positions are learned, so that the dimensions of queries and keys are free inside a head.
    Linear layers are stored the other way round (Conv1D): input first.
    """
    prefix = "transformer." if "transformer.wte.weight" in shapes else ""
    layers = layers_of(shapes, f"{prefix}h.", "ln_1.weight")
    width, heads = int(config["n_embd"]), int(config["n_head"])
    symmetries = []
    for layer in layers:
        symmetries.append(_mlp(layer, shapes, "mlp.c_fc", "mlp.c_proj", output_axis=1))
        symmetries.append(_gpt2_heads(f"{layer}attn.", width, heads))
    if residual:
        symmetries.append(_gpt2_residual(prefix, layers, width))
    known = rf"{prefix}(wte|wpe|ln_f|h)\..*|{KNOWN_HEADS}"
    return family_specification("gpt2", shapes, symmetries, known, residual, "n_inner")


def _gpt2_heads(start: str, width: int, heads: int) -> Symmetry:
    block = width // heads
    parts = (0, width, 2 * width)  # queries, keys, values
    moves = (
        *(Move(f"{start}c_attn.weight", 1, part, block) for part in parts),
        *(Move(f"{start}c_attn.bias", 0, part, block) for part in parts),
        Move(f"{start}c_proj.weight", 0, 0, block),
    )
    inside = (
        Inside("queries and keys", block, tuple(map(InnerMove, (0, 1, 3, 4)))),
        Inside("values", block, tuple(map(InnerMove, (2, 5, 6)))),
    )
    return Symmetry(f"{start}heads", heads, moves, inside)


def _gpt2_residual(prefix: str, layers: list[str], width: int) -> Symmetry:
    moves = moves_of_inputs(prefix, "wte", "wpe") + moves_of_outputs(prefix, "ln_f")
    moves += moves_of_heads()
    for start in layers:
        moves += moves_of_outputs(start, "ln_1", "ln_2")
        moves += [Move(f"{start}{name}.weight", 0) for name in ("attn.c_attn", "mlp.c_fc")]
        for name in ("attn.c_proj", "mlp.c_proj"):
            moves += [Move(f"{start}{name}.weight", 1), Move(f"{start}{name}.bias", 0)]
    return Symmetry("residual", width, tuple(moves))


def gpt_neox(config: Mapping[str, Any], shapes: Shapes, residual: bool) -> Specification:
    """MLP neurons, heads, and the values inside of each head; embeddings are rotary.

    Queries, keys and values of a head stand together.
    """
    prefix = "gpt_neox." if "gpt_neox.embed_in.weight" in shapes else ""
    layers = layers_of(shapes, f"{prefix}layers.", "input_layernorm.weight")
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    symmetries = []
    for layer in layers:
        symmetries.append(_mlp(layer, shapes, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"))
        symmetries.append(_neox_heads(f"{layer}attention.", heads, width // heads))
    if residual:
        symmetries.append(_neox_residual(prefix, layers, width))
    known = rf"{prefix}(embed_in|final_layer_norm|layers)\..*|{KNOWN_HEADS}"
    return family_specification(
        "gpt_neox", shapes, symmetries, known, residual, "intermediate_size"
    )


def _neox_heads(start: str, heads: int, block: int) -> Symmetry:
    moves = (
        *moves_of_outputs(start, "query_key_value", block=3 * block),
        Move(f"{start}dense.weight", 1, 0, block),
    )
    values = (InnerMove(0, 2 * block), InnerMove(1, 2 * block), InnerMove(2))
    return Symmetry(f"{start}heads", heads, moves, (Inside("values", block, values),))


def _neox_residual(prefix: str, layers: list[str], width: int) -> Symmetry:
    moves = moves_of_inputs(prefix, "embed_in") + moves_of_outputs(prefix, "final_layer_norm")
    moves += moves_of_heads()
    for start in layers:
        moves += moves_of_outputs(start, "input_layernorm", "post_attention_layernorm")
        moves += moves_of_inputs(start, "attention.query_key_value", "mlp.dense_h_to_4h")
        moves += moves_of_outputs(start, "attention.dense", "mlp.dense_4h_to_h")
    return Symmetry("residual", width, tuple(moves))


def bert(config: Mapping[str, Any], shapes: Shapes, residual: bool) -> Specification:
    """MLP neurons, heads, and inside of each head queries with keys, and values.

    Positions are learned, so that the dimensions of queries and keys are free inside a head.
    """
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in shapes else ""
    layers = layers_of(shapes, f"{prefix}encoder.layer.", "intermediate.dense.weight")
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    symmetries = []
    for layer in layers:
        symmetries.append(_mlp(layer, shapes, "intermediate.dense", "output.dense"))
        symmetries.append(_bert_heads(f"{layer}attention.", heads, width // heads))
    if residual:
        pooled = f"{prefix}pooler.dense.weight" in shapes
        # A classifier of tokens does not read the pooler, even if an old file has one.
        pooled &= "BertForTokenClassification" not in (config.get("architectures") or ())
        symmetries.append(_bert_residual(prefix, layers, width, pooled))
    known = rf"{prefix}(embeddings|encoder|pooler)\..*|cls\..*|{KNOWN_HEADS}"
    return family_specification("bert", shapes, symmetries, known, residual, "intermediate_size")


def _bert_heads(start: str, heads: int, block: int) -> Symmetry:
    moves = moves_of_outputs(f"{start}self.", "query", "key", "value", block=block)
    moves.append(Move(f"{start}output.dense.weight", 1, 0, block))
    inside = (
        Inside("queries and keys", block, tuple(map(InnerMove, (0, 1, 2, 3)))),
        Inside("values", block, tuple(map(InnerMove, (4, 5, 6)))),
    )
    return Symmetry(f"{start}heads", heads, tuple(moves), inside)


def _bert_residual(prefix: str, layers: list[str], width: int, pooled: bool) -> Symmetry:
    embeddings, head = f"{prefix}embeddings.", "cls.predictions."
    kinds = [f"{kind}_embeddings" for kind in ("word", "position", "token_type")]
    moves = moves_of_inputs(embeddings, *kinds) + moves_of_outputs(embeddings, "LayerNorm")
    moves += moves_of_inputs("", f"{prefix}pooler.dense", "qa_outputs")
    # The outputs of a pooler have an order that is not that of the residual stream.
    if not pooled:
        moves.append(Move("classifier.weight", 1))
    # The decoder is the word embedding: so what it reads has the order of that.
    moves += [Move(f"{head}transform.dense.weight", axis) for axis in (0, 1)]
    moves.append(Move(f"{head}transform.dense.bias", 0))
    moves += moves_of_outputs(head, "transform.LayerNorm") + moves_of_inputs(head, "decoder")
    for start in layers:
        moves += moves_of_inputs(f"{start}attention.self.", "query", "key", "value")
        moves += moves_of_inputs(start, "intermediate.dense")
        moves += moves_of_outputs(f"{start}attention.output.", "dense", "LayerNorm")
        moves += moves_of_outputs(f"{start}output.", "dense", "LayerNorm")
    return Symmetry("residual", width, tuple(moves))


def _mlp(start: str, shapes: Shapes, up: str, down: str, output_axis: int = 0) -> Symmetry:
    """The neurons between two layers whose weights have their outputs along output_axis."""
    weight = f"{start}{up}.weight"
    return Symmetry(
        f"{start}mlp",
        shapes[weight][output_axis],
        (
            Move(weight, output_axis),
            Move(f"{start}{up}.bias", 0),
            Move(f"{start}{down}.weight", 1 - output_axis),
        ),
        padding=True,
        feeds=(weight,),
    )
