"""GPT-2: learned positions, so that the dimensions of queries and keys are free inside a head.

Its linear layers are stored the other way round (Conv1D): input first.
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

MODEL_TYPES = ("gpt2",)


def specification(config: Mapping[str, Any], shapes: Shapes, residual: bool) -> Specification:
    """MLP neurons, heads, and inside of each head queries with keys, and values."""
    prefix = "transformer." if "transformer.wte.weight" in shapes else ""
    layers = layers_of(shapes, f"{prefix}h.{{layer}}.ln_1.weight")
    width, heads = int(config["n_embd"]), int(config["n_head"])
    symmetries = [
        present(symmetry, shapes)
        for layer in layers
        for symmetry in _layer(f"{prefix}h.{layer}.", shapes, width, heads)
    ]
    if residual:
        symmetries.append(present(_residual(prefix, layers, width), shapes))
    known = (f"{prefix}wte.", f"{prefix}wpe.", f"{prefix}ln_f.", f"{prefix}h.", "lm_head.")

    def is_known(name: str) -> bool:
        # Cross-attention reads another network, whose residual stream is not permuted.
        return name.startswith(known) and not (residual and "cross" in name)

    return with_known_fixed("gpt2", shapes, symmetries, is_known, "n_inner")


def _layer(start: str, shapes: Shapes, width: int, heads: int) -> Iterator[Symmetry]:
    yield Symmetry(
        f"{start}mlp",
        shapes[f"{start}mlp.c_fc.weight"][1],
        (
            Move(f"{start}mlp.c_fc.weight", 1),
            Move(f"{start}mlp.c_fc.bias", 0),
            Move(f"{start}mlp.c_proj.weight", 0),
        ),
        padding=True,
        feeds=(f"{start}mlp.c_fc.weight",),
    )
    block = width // heads
    parts = (0, width, 2 * width)  # queries, keys, values
    moves = (
        *(Move(f"{start}attn.c_attn.weight", 1, part, block) for part in parts),
        *(Move(f"{start}attn.c_attn.bias", 0, part, block) for part in parts),
        Move(f"{start}attn.c_proj.weight", 0, 0, block),
    )
    inside = (
        Inside("queries and keys", block, tuple(InnerMove(move) for move in (0, 1, 3, 4))),
        Inside("values", block, tuple(InnerMove(move) for move in (2, 5, 6))),
    )
    yield Symmetry(f"{start}attn.heads", heads, moves, inside)


def _residual(prefix: str, layers: list[int], width: int) -> Symmetry:
    moves = [
        Move(f"{prefix}wte.weight", 1),
        Move(f"{prefix}wpe.weight", 1),
        Move(f"{prefix}ln_f.weight", 0),
        Move(f"{prefix}ln_f.bias", 0),
        Move("lm_head.weight", 1),
    ]
    for layer in layers:
        start = f"{prefix}h.{layer}."
        moves += [Move(f"{start}{n}.{p}", 0) for n in ("ln_1", "ln_2") for p in ("weight", "bias")]
        moves += [Move(f"{start}{name}.weight", 0) for name in ("attn.c_attn", "mlp.c_fc")]
        for name in ("attn.c_proj", "mlp.c_proj"):
            moves += [Move(f"{start}{name}.weight", 1), Move(f"{start}{name}.bias", 0)]
    return Symmetry("residual", width, tuple(moves))
