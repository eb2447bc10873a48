"""What to call the models of a config where others read it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

# What raw checkpoints of mergekit-pytorch end in.
RAW_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def short_names(references: Sequence[str], local: Callable[[str], bool]) -> dict[str, str]:
    """For each model of a config, what to call it: never a place on this machine.

    A Hub id stays; a local path, and each of the two in model+adapter, becomes its last part, or
    as many as tell it from the others. local: whether a path is one, and not a Hub id.
    """
    result = {}
    for own in references:
        others = [other for other in references if other != own]
        depths = range(1, len(re.split(r"[/\\]", own)) + 1)
        unique = (
            depth
            for depth in depths
            if all(_shortened(o, depth, local) != _shortened(own, depth, local) for o in others)
        )
        result[own] = _shortened(own, next(unique, depths[-1]), local)
    return result


def is_local(path: str) -> bool:
    """Whether a model of a config is a file or folder here, and not a Hub id."""
    path = path.split("@")[0]
    return os.path.exists(path) or path[:1] in ("/", "\\", ".", "~") or path.count("/") > 1


def _shortened(reference: str, depth: int, local: Callable[[str], bool]) -> str:
    parts = []
    for path in reference.split("+"):
        pieces = re.split(r"[/\\]", os.path.abspath(os.path.expanduser(path)))
        parts.append("/".join(pieces[-depth:]) if local(path) else path)
    return "+".join(parts)
