"""Checkpoints to align: read lazily, and written anew with other tensors in them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import replacing
from mergekit_karcher.host.checkpoints import open_checkpoint
from mergekit_karcher.report.names import RAW_SUFFIXES

# The dtypes that align reads and writes, by what safetensors calls them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_SAFETENSORS = ".safetensors"
_CONFIG = "config.json"


class Checkpoint:
    """A Hugging Face model (folder or Hub id) or a raw file of tensors, read lazily.

    reference: the folder, Hub id or file. name: what it is called in the output.
    is_raw: whether it is a file.
    config: the model's config.json; None if there is none.
    shapes, dtypes: those of every tensor, by name.
    """

    def __init__(self, reference: str, name: str, cache: str | None = None) -> None:
        """Open a checkpoint.

        cache: where models from the Hub are kept; by default where huggingface_hub keeps them.
        Raises `KarcherError` if it is no file that is there, has an adapter, or holds what align
        does not read.
        """
        self.reference, self.name = reference, name
        if "+" in reference:
            raise KarcherError(
                f"{reference} is a model with an adapter: merge the adapter into it first, then "
                "align the result."
            )
        self.is_raw = Path(reference).is_file()
        if reference.endswith(RAW_SUFFIXES) and not self.is_raw:
            raise KarcherError(f"There is no file {reference}.")
        self._folder, self._index, self._loader = open_checkpoint(reference, cache)
        self.config: dict[str, Any] | None = None
        if not self.is_raw and (self._folder / _CONFIG).is_file():
            self.config = json.loads((self._folder / _CONFIG).read_text(encoding="utf-8"))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        if self._index.is_safetensors:
            for shard in self._index.shards:
                self._list_safetensors(self._folder / shard.filename, shard.contained_keys)
        else:
            self._list_pickles()

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its name; borrowed, for .bin and .pt files keep it in memory."""
        tensor: torch.Tensor = self._loader.get_tensor(name)
        return tensor

    def _list_safetensors(self, path: Path, names: Iterable[str]) -> None:
        with safe_open(path, framework="pt") as file:
            for name in names:
                part = file.get_slice(name)
                code = part.get_dtype()
                if code not in _DTYPES:
                    raise KarcherError(
                        f"{name} of {self.reference} is {code}, which align does not read: convert "
                        "it first."
                    )
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), _DTYPES[code]

    def _list_pickles(self) -> None:
        for name in self._index.tensor_paths:
            try:
                tensor = self.read(name)
            except KeyError:
                raise KarcherError(
                    f"{self.reference} does not hold its tensors by name alone: save the state "
                    "dictionary by itself."
                ) from None
            self.shapes[name], self.dtypes[name] = tuple(tensor.shape), tensor.dtype

    def target(self, out: Path) -> Path:
        """Where `write` puts the checkpoint in a folder; nothing may be there yet."""
        return out / (f"{self.name}{Path(self.reference).suffix}" if self.is_raw else self.name)

    def write(
        self,
        out: Path,
        changed: Callable[[str], torch.Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        config: Mapping[str, Any],
    ) -> Path:
        """Write the same checkpoint with other tensors into a folder, whole or not at all.

        Shards, names and the files beside them stay as they are; .bin weights of a Hugging Face
        model become safetensors. Holds one tensor at a time, of .bin and .pt files all of a file.

        changed: gives the tensor to write under a name; one that does not have the dtype that it
            has here and its new shape raises `KarcherError`.
        config: values that replace those of config.json.
        """
        out.mkdir(parents=True, exist_ok=True)
        path = self.target(out)
        with replacing(path) as partial:
            if not self.is_raw:
                partial.mkdir()
                for shard in self._index.shards:
                    target = partial / _as_safetensors(shard.filename)
                    names = shard.contained_keys
                    self._write_shard(shard.filename, target, names, changed, shapes)
                self._copy_rest(partial, config)
            elif path.suffix == _SAFETENSORS:
                self._write_shard(Path(self.reference).name, partial, self.shapes, changed, shapes)
            else:
                torch.save({name: changed(name) for name in self.shapes}, partial)
        return path

    def _write_shard(
        self,
        filename: str,
        target: Path,
        names: Iterable[str],
        changed: Callable[[str], torch.Tensor],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        metadata: Mapping[str, str] = {"format": "pt"}
        if filename.endswith(_SAFETENSORS):
            with safe_open(self._folder / filename, framework="pt") as file:
                metadata = file.metadata() or metadata
                # Read in the order in which they are in the file.
                names = list(file.offset_keys())
        entries = {name: (self.dtypes[name], shapes[name]) for name in names}
        write_safetensors(target, entries, changed, metadata)

    def _copy_rest(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Copy the files beside the weights, and write the config and the index of the shards."""
        for path in sorted(self._folder.iterdir()):
            weights = path.name.endswith((*RAW_SUFFIXES, ".index.json", ".gguf", ".h5", ".msgpack"))
            if path.is_file() and not weights and path.name != _CONFIG:
                shutil.copyfile(path, folder / path.name)
        if self.config is not None:
            _write_json(folder / _CONFIG, {**self.config, **config})
        if len(self._index.shards) > 1 or "-of-" in self._index.shards[0].filename:
            files = {
                name: _as_safetensors(file)
                for name, file in sorted(self._index.tensor_paths.items())
            }
            size = sum((folder / file).stat().st_size for file in set(files.values()))
            index = {"metadata": {"total_size": size}, "weight_map": files}
            _write_json(folder / "model.safetensors.index.json", index)


def write_safetensors(
    path: Path,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file one tensor at a time; safetensors' function needs all at once.

    The format: eight bytes for the length of the header, the header in JSON, the tensors' bytes.

    entries: dtype and shape of every tensor, in the order in which they are written; a tensor
        that comes otherwise raises `KarcherError`, for the file could not be read.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, (dtype, shape) in entries.items():
        offsets = [start, start + math.prod(shape) * dtype.itemsize]
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": offsets}
        start = offsets[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, (dtype, shape) in entries.items():
            tensor = read(name).contiguous()
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, tuple(shape)):
                raise KarcherError(
                    f"{name} came as {tensor.dtype} {tuple(tensor.shape)}, but {dtype} "
                    f"{tuple(shape)} was to be written to {path}: give a tensor of that dtype and "
                    "shape."
                )
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _as_safetensors(filename: str) -> str:
    """The name of a shard once it is safetensors."""
    if filename.endswith(_SAFETENSORS):
        return filename
    return f"{filename.removesuffix('.bin').replace('pytorch_model', 'model')}{_SAFETENSORS}"
