"""Checkpoints, read through mergekit's lazy loaders; no pickle is ever read unrestricted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_karcher.host.places import check_places
from mergekit_karcher.host.quantised import dequantising

_FORCED, _LIFTED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class OpenCheckpoint(NamedTuple):
    """A checkpoint whose tensors are read when they are asked for.

    folder: where its files are. index: mergekit's `ShardedTensorIndex`, the shard of each tensor.
    loader: mergekit's `LazyTensorLoader`; `loader.get_tensor(name)` reads one.
    """

    folder: Path
    index: Any
    loader: Any


def open_checkpoint(reference: str, cache: str | None = None) -> OpenCheckpoint:
    """Open a model or a file of tensors without reading its weights.

    Arguments:
        reference: A folder, a Hub id, or a file (.safetensors, .bin, .pt, .pth).
        cache: Where models from the Hub are kept; by default where huggingface_hub keeps them.

    Returns:
        The checkpoint. Whoever opens it keeps it: nothing is remembered here, so that a file that
        changes is read anew the next time it is opened.

    Raises:
        Exception: Whatever mergekit, huggingface_hub or torch raise where there is no checkpoint,
            or where it is a pickle that holds more than tensors.
        KarcherError: If it is nowhere, or quantised in a way that is not read here.
    """
    from mergekit.common import ModelReference
    from mergekit.io import LazyTensorLoader, ShardedTensorIndex

    path = Path(reference)
    check_places([reference], cache=cache)
    with restricted_unpickling():
        if path.is_file():
            folder, index = path.parent, ShardedTensorIndex.from_file(reference)
        else:
            model = ModelReference.parse(reference)
            folder = Path(model.local_path(cache_dir=cache))
            index = ShardedTensorIndex.from_disk(str(folder))
        loader = dequantising(LazyTensorLoader(index, lazy_unpickle=False), reference)
    return OpenCheckpoint(folder, loader.index, loader)


def folders_of(reference: str, cache: str | None = None) -> list[Path]:
    """Where a model and its adapter are, fetched from the Hub where they are not here.

    Arguments:
        reference: As configs name models: a folder or a Hub id, also with @revision and +adapter.
        cache: Where models from the Hub are kept; by default where huggingface_hub keeps them.

    Raises:
        KarcherError: If one of them is nowhere.
    """
    from mergekit.common import ModelReference

    check_places([reference], cache=cache)
    model = ModelReference.parse(reference)
    parts = [ModelReference(model=model.model)]
    if model.lora is not None:
        parts.append(ModelReference(model=model.lora))
    return [Path(part.local_path(cache_dir=cache)) for part in parts]


@contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Have every `torch.load` in the block read tensors only, whatever torch's default is.

    mergekit indexes .bin files by a `torch.load` that leaves this to torch: before 2.6 that ran
    what a pickle asked for, and an environment variable brings that back.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _LIFTED)}
    os.environ[_FORCED] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})
