"""Names for the models of a config that tell others nothing about this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

# What raw checkpoints of mergekit-pytorch end in.
RAW_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".th", ".tar")


def short_names(references: Sequence[str], local: Callable[[str], bool]) -> dict[str, str]:
    """A name for each model of a config (Hub id, local path, or model+adapter) without local paths.

    `local` says whether one of these parts is a local path. Hub ids stay as they are; of a local
    path the last part is left, or as many parts as tell it from the other models.
    """
    names = {}
    for reference in references:
        others = [other for other in references if other != reference]
        for depth in range(1, len(re.split(r"[/\\]", reference)) + 1):
            names[reference] = _shortened(reference, depth, local)
            if names[reference] not in (_shortened(other, depth, local) for other in others):
                break
    return names


def is_local(path: str) -> bool:
    """Whether a model of a config is a local file or folder, and not a Hub id.

    A path of two parts that is not there looks like a Hub id, and is taken for one.
    """
    path = path.split("@")[0]
    on_windows = re.match(r"[A-Za-z]:[/\\]", path) is not None or "\\" in path
    return os.path.exists(path) or on_windows or path[:1] in ("/", ".", "~") or path.count("/") > 1


def _shortened(reference: str, depth: int, local: Callable[[str], bool]) -> str:
    parts = []
    for path in reference.split("+"):
        pieces = re.split(r"[/\\]", os.path.abspath(os.path.expanduser(path)))
        parts.append("/".join(pieces[-depth:]) if local(path) else path)
    return "+".join(parts)
