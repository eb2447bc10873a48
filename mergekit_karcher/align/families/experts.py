"""Mixtures of experts: the experts of a layer may stand in any order, with their router's rows.

Checkpoints have a tensor for each expert. Moves see those of one kind as one tensor, the experts
side by side: then an expert is a block of it, and its neurons are units inside of that block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mergekit_karcher.align.symmetry import (
    InnerMove,
    Inside,
    Joined,
    Move,
    Shapes,
    Symmetry,
)
from mergekit_karcher.errors import KarcherError

# Where a layer has its experts, and what gate, up and down are called there.
_KINDS = {
    "block_sparse_moe.": ("w1", "w3", "w2"),
    "mlp.": ("gate_proj", "up_proj", "down_proj"),
}
_PART = re.compile(r"(.+\.experts)\.(\d+)\.((w[123]|(gate|up|down)_proj)\.weight)")
# The neurons of an expert are what down reads, and what the others write.
_DOWN = ("w2.weight", "down_proj.weight")


def joined_experts(shapes: Shapes) -> tuple[Shapes, dict[str, Joined]]:
    """The shapes of a model with the experts of each layer as one tensor, and what is joined.

    Raises `KarcherError` if the experts of a layer differ in shape or some are missing.
    """
    numbers: dict[str, dict[int, str]] = {}
    for name in shapes:
        match = _PART.fullmatch(name)
        if match:
            numbers.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = name
    joined = {}
    result = dict(shapes)
    for name, by_number in numbers.items():
        parts = tuple(by_number[number] for number in sorted(by_number))
        first, *others = (result.pop(part) for part in parts)
        if max(by_number) >= len(parts) or any(shape != first for shape in others):
            raise KarcherError(
                f"The experts of {name} are not complete, or not all of one shape: align knows no "
                "way to reorder these."
            )
        axis = 1 if name.endswith(_DOWN) else 0
        joined[name] = Joined(parts, axis)
        shape = list(first)
        shape[axis] *= len(parts)
        result[name] = tuple(shape)
    return result, joined


def experts(start: str, shapes: Shapes) -> Iterator[Symmetry]:
    """The experts of the layer whose names begin with start, if it has any."""
    for place, (gate, up, down) in _KINDS.items():
        router = f"{start}{place}gate.weight"
        if router in shapes:
            count = shapes[router][0]
            weights = (f"{start}{place}experts.{name}.weight" for name in (gate, up, down))
            gate, up, down = weights
            neurons = shapes[gate][0] // count
            moves = (
                Move(gate, 0, 0, neurons),
                Move(up, 0, 0, neurons),
                Move(down, 1, 0, neurons),
                Move(router, 0),
            )
            inside = Inside("neurons", neurons, tuple(map(InnerMove, range(3))))
            yield Symmetry(f"{start}{place}experts", count, moves, (inside,))
