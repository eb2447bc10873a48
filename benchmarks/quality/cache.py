"""Trained weights and fetched files, kept so that an evaluation can be run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def cached(folder: Path, name: str, settings: Mapping[str, Any], make: Callable[[], T]) -> T:
    """What make() returned when it was last run with these settings and this torch."""
    stamp = json.dumps({"torch": torch.__version__} | dict(settings), sort_keys=True)
    digest = hashlib.sha256(stamp.encode()).hexdigest()[:12]
    path = folder / f"{name}-{digest}.pt"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(make(), partial)
        # A run that was interrupted leaves no half-written file behind under the true name.
        partial.rename(path)
    # Mapped, so that weights that are not used at the moment need not stay in memory.
    found: T = torch.load(path, weights_only=True, mmap=True)
    return found
