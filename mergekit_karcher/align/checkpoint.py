"""Checkpoints to align: read lazily, and written anew with other tensors in them."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.files import replacing
from mergekit_karcher.host.checkpoints import open_checkpoint
from mergekit_karcher.host.headers import headers_of
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
# float8 weights are read as what they stand for.
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SAFETENSORS = ".safetensors"
_CONFIG = "config.json"
ONE_FILE = "model.safetensors"


class Checkpoint:
    """A Hugging Face model (folder or Hub id) or a raw file of tensors, read lazily.

    reference: the folder, Hub id or file, as it was given. place: the same without ~.
    name: what it is called in the output.
    is_raw: whether it is a file.
    config: the model's config.json; None if there is none.
    shapes, dtypes: those of every tensor, by name.
    """

    def __init__(self, reference: str, name: str, cache: str | None = None) -> None:
        """Open a checkpoint, without reading its weights.

        cache: where models from the Hub are kept; by default where huggingface_hub keeps them.
        Raises `KarcherError` if nothing is there, if it has an adapter, or holds what align does
        not read.
        """
        self.reference, self.name = reference, name
        self.place = os.path.expanduser(reference)
        if "+" in reference:
            raise KarcherError(
                f"{reference} is a model with an adapter: merge the adapter into it first, then "
                "align the result."
            )
        self.is_raw = Path(self.place).is_file()
        try:
            self._folder, self._index, self._loader = open_checkpoint(self.place, cache)
        except KarcherError:
            raise
        except Exception as error:  # mergekit, torch and the Hub raise errors of many kinds
            why = first_line(error).rstrip(".:")
            raise KarcherError(f"{reference} cannot be read: {why}.") from None
        self.config: dict[str, Any] | None = None
        if not self.is_raw and (self._folder / _CONFIG).is_file():
            self.config = json.loads((self._folder / _CONFIG).read_text(encoding="utf-8"))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        headers = headers_of(self._index)
        if self._index.tensor_paths.keys() - headers.keys():
            raise self._holds_more()
        for tensor, (code, shape) in headers.items():
            if code not in _DTYPES and code not in _FLOAT8:
                raise KarcherError(
                    f"{tensor} of {reference} is {code}, which align does not read: convert it "
                    "first."
                )
            self.shapes[tensor], self.dtypes[tensor] = shape, _DTYPES.get(code, torch.float32)
        self._is_float8 = any(code in _FLOAT8 for code, _ in headers.values())

    @property
    def only_file(self) -> Path | None:
        """The one file that has all weights; None if there are several."""
        files = set(self._index.tensor_paths.values())
        return self._folder / files.pop() if len(files) == 1 else None

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its name; borrowed, for pickled files keep it in memory."""
        try:
            tensor: torch.Tensor = self._loader.get_tensor(name)
        except KeyError:
            raise self._holds_more() from None
        # A file may hold parameters, which would have torch record gradients.
        return tensor.detach().to(self.dtypes[name])

    def _holds_more(self) -> KarcherError:
        return KarcherError(
            f"{self.reference} does not hold its tensors by name alone: save the state dictionary "
            "by itself."
        )

    def target(self, out: Path) -> Path:
        """Where `write` puts the checkpoint in a folder; nothing may be there yet."""
        return out / (f"{self.name}{Path(self.place).suffix}" if self.is_raw else self.name)

    def write(
        self,
        out: Path,
        changed: Callable[[str], torch.Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        config: Mapping[str, Any],
        one_file: bool = False,
    ) -> Path:
        """Write the same checkpoint with other tensors into a folder, whole or not at all.

        Shards, names and the files beside them stay as they are; .bin weights of a Hugging Face
        model become safetensors. Holds one tensor at a time, of pickled files all of a file.

        changed: gives the tensor to write under a name; one that does not have the dtype that it
            has here and its new shape raises `KarcherError`.
        config: values that replace those of config.json.
        one_file: whether a model gets all its weights in one file, model.safetensors.
        """
        out.mkdir(parents=True, exist_ok=True)
        path = self.target(out)
        sources = sorted(set(self._index.tensor_paths.values()))
        with replacing(path) as partial:
            if not self.is_raw:
                partial.mkdir()
                targets: dict[str, list[str]] = {}
                for source in sources:
                    target = ONE_FILE if one_file else _as_safetensors(source)
                    targets.setdefault(target, []).append(source)
                for target, parts in targets.items():
                    self._write_file(parts, partial / target, changed, shapes)
                self._copy_rest(partial, config, one_file)
            elif self._index.is_safetensors:
                self._write_file(sources, partial, changed, shapes)
            else:
                torch.save({name: changed(name) for name in self.shapes}, partial)
        return path

    def _write_file(
        self,
        sources: Iterable[str],
        target: Path,
        changed: Callable[[str], torch.Tensor],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Write a safetensors file with the tensors of one or several of the model's files."""
        metadata: Mapping[str, str] = {"format": "pt"}
        names: list[str] = []
        files = self._index.tensor_paths
        for source in sources:
            stored: Iterable[str] = files
            if self._index.is_safetensors:
                with safe_open(self._folder / source, framework="pt") as file:
                    metadata = file.metadata() or metadata
                    # Read in the order in which they are in the file.
                    stored = list(file.offset_keys())
            names += [name for name in stored if files.get(name) == source]
        entries = {name: (self.dtypes[name], shapes[name]) for name in names}
        write_safetensors(target, entries, changed, metadata)

    def _copy_rest(self, folder: Path, config: Mapping[str, Any], one_file: bool) -> None:
        """Copy the files beside the weights, and write the config and the index of the shards."""
        for path in sorted(self._folder.iterdir()):
            weights = path.name.endswith((*RAW_SUFFIXES, ".index.json", ".gguf", ".h5", ".msgpack"))
            if path.is_file() and not weights and path.name != _CONFIG:
                shutil.copyfile(path, folder / path.name)
        if self.config is not None:
            written = {**self.config, **config}
            if self._is_float8:
                written.pop("quantization_config", None)
            _write_json(folder / _CONFIG, written)
        files = {
            name: _as_safetensors(file) for name, file in sorted(self._index.tensor_paths.items())
        }
        if not one_file and any(file != ONE_FILE for file in files.values()):
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
