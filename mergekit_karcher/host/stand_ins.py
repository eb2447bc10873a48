"""Models of the Hub by their headers alone, so that a merge is checked before they are fetched."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
from huggingface_hub import errors
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

_WEIGHTS = ".safetensors"
_OTHERS = ["*.json", "tokenizer.model"]
_REQUESTS = 8


def to_fetch(references: Iterable[str], cache: str | None) -> list[str]:
    """The models among those named that mergekit would fetch from the Hub.

    None where a LoRA adapter is among them: mergekit merges it into whole weights to plan.

    references: paths or Hub ids, with @revision and +adapter or without. cache: where models from
    the Hub are kept.
    """
    references = list(references)
    if any("+" in reference and not Path(reference).exists() for reference in references):
        return []
    return [name for name in references if not Path(name).exists() and not _is_here(name, cache)]


@contextmanager
def headers_only(references: Iterable[str], cache: str | None) -> Iterator[None]:
    """Have mergekit plan with these models without their weights, and fetch only small files.

    In the place of each weight file stands a sparse one with the same header.

    references: as `to_fetch` gives them. A model without safetensors is fetched.
    """
    with tempfile.TemporaryDirectory(prefix="mergekit-karcher-") as folder:
        stand_ins = {}
        for number, reference in enumerate(references):
            place = Path(folder, str(number))
            place.mkdir()
            if _stand_in(reference, place, cache):
                stand_ins[ModelReference.parse(reference)] = str(place)
        local_path = ModelReference.local_path

        def path_of(model: ModelReference, *arguments: Any, **options: Any) -> str:
            return stand_ins.get(model) or local_path(model, *arguments, **options)

        LoaderCache.loaders.clear()
        try:
            with mock.patch.object(ModelReference, "local_path", path_of):
                yield
        finally:
            LoaderCache.loaders.clear()


def _is_here(reference: str, cache: str | None) -> bool:
    """Whether all weights of a model are in the cache of the Hub."""
    name, _, revision = reference.partition("@")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, cache_dir=cache, local_files_only=True
            )
        )
    except errors.LocalEntryNotFoundError:
        return False
    index = folder / f"model{_WEIGHTS}.index.json"
    shards = {f"model{_WEIGHTS}"}
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / shard).is_file() for shard in shards)


def _stand_in(reference: str, place: Path, cache: str | None) -> bool:
    """Fill a folder with what stands for a model; whether that can be done."""
    name, _, revision = reference.partition("@")
    api = huggingface_hub.HfApi()
    files = api.list_repo_files(name, revision=revision or None)
    weights = [file for file in files if file.endswith(_WEIGHTS) and "/" not in file]
    if not weights:
        return False
    fetched = huggingface_hub.snapshot_download(
        name, revision=revision or None, cache_dir=cache, allow_patterns=_OTHERS
    )
    for path in Path(fetched).iterdir():
        (place / path.name).symlink_to(path)

    def copy_header(file: str) -> None:
        metadata = api.parse_safetensors_file_metadata(name, file, revision=revision or None)
        entries = {
            tensor: {"dtype": e.dtype, "shape": e.shape, "data_offsets": e.data_offsets}
            for tensor, e in metadata.tensors.items()
        }
        header = json.dumps(entries).encode()
        with (place / file).open("wb") as stand_in:
            stand_in.write(len(header).to_bytes(8, "little") + header)
            ends = (entry.data_offsets[1] for entry in metadata.tensors.values())
            stand_in.truncate(8 + len(header) + max(ends, default=0))

    with ThreadPoolExecutor(_REQUESTS) as threads:
        list(threads.map(copy_header, weights))
    return True
