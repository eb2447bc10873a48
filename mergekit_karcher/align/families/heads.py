"""What stands on a language model: output layers, classifiers, heads for rewards and values.

Each reads the residual stream, and nothing but the output depends on the order of its own units.
"""

from __future__ import annotations

import re

from mergekit_karcher.align.symmetry import Move, moves_of_inputs

NAMES = (
    "lm_head",
    "embed_out",
    "score",
    "classifier",
    "qa_outputs",
    "multiple_choice_head.summary",
    "v_head.summary",
    "value_head",
    "reward_head",
)

# Matches the names of their tensors.
KNOWN_HEADS = rf"({'|'.join(map(re.escape, NAMES))})\.(weight|bias)"


def moves_of_heads() -> list[Move]:
    """What permuting the residual stream moves in any of them."""
    return moves_of_inputs("", *NAMES)
