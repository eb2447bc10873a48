"""Configs of mergekit as plain documents: read, and searched for the models that they name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mergekit_karcher.errors import KarcherError

MODEL_KEYS = ("model", "base_model")

# The metrics that need no file: the one that is the same for every element, and that of a layer's
# own change from the base.
IDENTITY, SELF = "identity", "self"


def read_documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a config, one a merge; raises `KarcherError` for anything else."""
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise KarcherError(f"{path} is not valid YAML: {where}.") from None
    if not any(documents):
        raise KarcherError(f"{path} is empty.")
    if not all(isinstance(one, dict) and "merge_method" in one for one in documents):
        raise KarcherError(f"{path} is no config of mergekit: it has no merge_method.")
    return documents


def read_config(path: Path) -> dict[str, Any]:
    """The one document of a config; raises `KarcherError` for anything else."""
    documents = read_documents(path)
    if len(documents) != 1:
        raise KarcherError(
            f"{path} has {len(documents)} documents: give the one stage of mergekit-multi that is "
            "meant."
        )
    return documents[0]


def named_in(part: Any, keys: tuple[str, ...] = MODEL_KEYS) -> Iterator[str]:
    """Every string that stands under one of those keys, at any depth."""
    if isinstance(part, list):
        for item in part:
            yield from named_in(item, keys)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key in keys and isinstance(value, str):
                yield value
            else:
                yield from named_in(value, keys)


def metrics_in(part: Any) -> Iterator[str]:
    """Every metric, however filters and layers may choose it."""
    if isinstance(part, list):
        for item in part:
            yield from metrics_in(item)
    elif isinstance(part, dict):
        for key, value in part.items():
            yield from _strings(value) if key == "metric" else metrics_in(value)


def _strings(setting: Any) -> Iterator[str]:
    if isinstance(setting, str):
        yield setting
    elif isinstance(setting, list):
        for item in setting:
            yield from _strings(item)
    elif isinstance(setting, dict):
        yield from _strings(setting.get("value"))
