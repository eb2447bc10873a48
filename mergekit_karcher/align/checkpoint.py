"""Checkpoints as mergekit's lazy loaders read them, and the same with other tensors in them."""

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

from mergekit_karcher.errors import KarcherError

Change = Callable[[str, torch.Tensor], torch.Tensor]

# What safetensors calls the dtypes that align writes.
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_CONFIG = "config.json"


class Checkpoint:
    """A Hugging Face model (folder or Hub id) or a raw file of tensors, read lazily.

    name: what it is called in the output. shapes, dtypes: of every tensor, by name.
    """

    def __init__(self, reference: str, name: str, cache: str | None = None) -> None:
        from mergekit.common import ModelReference
        from mergekit.io import LazyTensorLoader, ShardedTensorIndex

        self.reference, self.name = reference, name
        if "+" in reference:
            raise KarcherError(
                f"{reference} is a model with an adapter: merge the adapter into it first, then "
                "align the result."
            )
        path = Path(reference)
        self.is_raw = path.is_file()
        if reference.endswith(_WEIGHTS) and not self.is_raw:
            raise KarcherError(f"There is no file {reference}.")
        if self.is_raw:
            self.folder = path.parent
            index = ShardedTensorIndex.from_file(str(path))
        else:
            model = ModelReference.parse(reference)
            self.folder = Path(model.local_path(cache_dir=cache))
            index = ShardedTensorIndex.from_disk(str(self.folder))
        self.index = index
        self._loader = LazyTensorLoader(index, lazy_unpickle=False)
        self.config: dict[str, Any] | None = None
        if not self.is_raw and (self.folder / _CONFIG).is_file():
            self.config = json.loads((self.folder / _CONFIG).read_text(encoding="utf-8"))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._look()

    def get(self, name: str) -> torch.Tensor:
        """A tensor by name."""
        tensor: torch.Tensor = self._loader.get_tensor(name)
        return tensor

    def _look(self) -> None:
        if not self.index.is_safetensors:
            for name in self.index.tensor_paths:
                try:
                    tensor = self.get(name)
                except KeyError:
                    raise KarcherError(
                        f"{self.reference} does not hold its tensors by name alone: save the state "
                        "dictionary by itself."
                    ) from None
                self.shapes[name], self.dtypes[name] = tuple(tensor.shape), tensor.dtype
            return
        for shard in self.index.shards:
            with safe_open(self.folder / shard.filename, framework="pt") as file:
                for name in shard.contained_keys:
                    part = file.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise KarcherError(
                            f"{name} of {self.reference} is {part.get_dtype()}, which align does "
                            "not read: convert it first."
                        )
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = _DTYPES[part.get_dtype()]

    def write(
        self,
        out: Path,
        change: Change,
        shapes: Mapping[str, tuple[int, ...]],
        config: Mapping[str, Any],
    ) -> Path:
        """The same checkpoint with changed tensors, in the folder out; returns its path.

        change: what to put in the place of a tensor, of the shape that shapes has for it. config:
        values that differ in config.json. Shards, names and the files beside them stay as they
        are; weights in .bin become safetensors. Appears whole or not at all. Holds one tensor at
        a time, of .bin and .pt files all of a file.
        """
        if self.is_raw:
            path = self.target(out)
            partial = path.with_name(f"{path.name}.partial")
            self._write_file(Path(self.reference), partial, self.shapes, change, shapes)
            os.replace(partial, path)
            return path
        path, partial = out / self.name, out / f"{self.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for shard in self.index.shards:
            target = partial / self._renamed(shard.filename)
            self._write_file(
                self.folder / shard.filename, target, shard.contained_keys, change, shapes
            )
        self._copy_rest(partial, config)
        partial.rename(path)
        return path

    def target(self, out: Path) -> Path:
        """Where `write` puts it; must not be there yet."""
        return out / (f"{self.name}{Path(self.reference).suffix}" if self.is_raw else self.name)

    def _write_file(
        self,
        source: Path,
        target: Path,
        names: Iterable[str],
        change: Change,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        if target.suffix != ".safetensors" and not target.name.endswith(".safetensors.partial"):
            torch.save({name: change(name, self.get(name)) for name in names}, target)
            return
        metadata: Mapping[str, str] = {"format": "pt"}
        order = list(names)
        if source.suffix == ".safetensors":
            with safe_open(source, framework="pt") as file:
                metadata = file.metadata() or metadata
                # Read in the order in which they lie in the file.
                order = list(file.offset_keys())
        entries = {name: (self.dtypes[name], shapes[name]) for name in order}
        write_safetensors(target, entries, lambda name: change(name, self.get(name)), metadata)

    def _renamed(self, shard: str) -> str:
        if shard.endswith(".safetensors"):
            return shard
        stem = shard.removesuffix(".bin").replace("pytorch_model", "model")
        return f"{stem}.safetensors"

    def _copy_rest(self, target: Path, config: Mapping[str, Any]) -> None:
        for path in sorted(self.folder.iterdir()):
            weights = path.name.endswith((*_WEIGHTS, ".index.json", ".gguf", ".h5", ".msgpack"))
            if path.is_file() and not weights and path.name != _CONFIG:
                shutil.copyfile(path, target / path.name)
        if self.config is not None:
            text = json.dumps({**self.config, **config}, indent=2)
            (target / _CONFIG).write_text(f"{text}\n", encoding="utf-8")
        if len(self.index.shards) > 1 or "-of-" in self.index.shards[0].filename:
            files = {
                name: self._renamed(file) for name, file in sorted(self.index.tensor_paths.items())
            }
            size = sum((target / file).stat().st_size for file in set(files.values()))
            index = {"metadata": {"total_size": size}, "weight_map": files}
            name = target / "model.safetensors.index.json"
            name.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(
    path: Path,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    get: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file, a tensor at a time: safetensors' own function wants all of them at once.

    entries: dtype and shape of every tensor, in order. The format: eight bytes of the header's
    length, the header in JSON, the tensors' bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in entries.items():
        end = offset + math.prod(shape) * dtype.itemsize
        offsets = [offset, end]
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": offsets}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, (dtype, shape) in entries.items():
            tensor = get(name).contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
