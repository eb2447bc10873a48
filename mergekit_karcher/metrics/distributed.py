"""Adam's second moments in a checkpoint of torch.distributed, none of whose pickles is trusted.

Such a checkpoint is a folder of .distcp shards and a pickle, `.metadata`, that says what lies where
in them. torch reads that pickle, and every value that is no tensor, without any restriction: both
go through readers of ours here.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.metrics.moments import Moments

_MOMENT = re.compile(r"(?:.*?\.)?state\.(.+)\.exp_avg_sq")
_SETTING = re.compile(r"param_groups\..*\.(betas|eps)$")

# All that torch 2.5 and later put into .metadata, by the names under which pickle asks for it.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")
    },
}
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


def distributed_moments(folder: Path) -> Iterator[tuple[str, Moments]]:
    """Read the second moments of every parameter, one after the other.

    Arguments:
        folder: Of the checkpoint; `.metadata` lies in it.

    Yields:
        The name of a parameter as the checkpoint has it, and its moments, in tensors of their own.

    Raises:
        KarcherError: If the folder cannot be read, is not Adam's or does not say its settings, or
            if one of its pickles asks for more than a checkpoint of torch holds.
    """
    checkpoint = _Checkpoint(folder)
    moments = {key: match[1] for key in checkpoint.entries if (match := _MOMENT.fullmatch(key))}
    if not moments:
        raise KarcherError(
            f"{folder} has no exp_avg_sq of a named parameter: only checkpoints of Adam and AdamW "
            "keep the second moments that are needed."
        )
    settings = checkpoint.read([key for key in checkpoint.entries if _SETTING.search(key)])
    beta2 = {value[1] for key, value in settings.items() if key.endswith(".betas")}
    eps = {value for key, value in settings.items() if key.endswith(".eps")}
    if len(beta2) != 1 or len(eps) != 1:
        raise KarcherError(
            f"{folder} says {len(beta2)} values of beta2 and {len(eps)} of eps: one of each is "
            "needed; save the optimizer's param_groups with its state."
        )
    for key, name in moments.items():
        step = key.removesuffix("exp_avg_sq") + "step"
        if step not in checkpoint.entries:
            raise KarcherError(f"{folder} does not say the step of {name}.")
        values = checkpoint.read([key, step])
        yield name, Moments(values[key], float(values[step]), float(*beta2), float(*eps))


class _Checkpoint:
    """An open checkpoint: its entries by name, and their values when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = _RestrictedReader(folder, _read_metadata(folder / ".metadata"))
        self.entries = self._reader.metadata.state_dict_metadata

    def read(self, names: Sequence[str]) -> dict[str, Any]:
        """The values of some entries, in new tensors on the CPU or as plain numbers and tuples."""
        values: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            if isinstance(entry := self.entries[name], TensorStorageMetadata)
            else None
            for name in names
        }
        with warnings.catch_warnings():
            # About the process group that one process does not have.
            warnings.simplefilter("ignore")
            try:
                load(
                    values, storage_reader=self._reader, planner=_RestrictedPlanner(), no_dist=True
                )
            # It is no Exception, and only says what went wrong in each process.
            except CheckpointException as error:
                cause = next((failure[0] for failure in error.failures.values()), error)
                if isinstance(cause, KeyboardInterrupt):
                    raise cause from None
                raise KarcherError(
                    f"{names[0]} of {self._folder} cannot be read ({first_line(cause)}): save the "
                    "checkpoint again, with nothing but tensors and numbers in the optimizer's "
                    "state."
                ) from None
        return values


class _RestrictedReader(FileSystemReader):
    """torch's reader, with metadata that have been read already."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata


class _RestrictedPlanner(DefaultLoadPlanner):
    """torch's planner, which would unpickle whatever is no tensor without any restriction."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file).load()
        if not isinstance(content, Metadata):
            raise TypeError(f"it holds {type(content).__name__}")
    except Exception as error:
        raise KarcherError(
            f"{path} cannot be read as the metadata of a torch checkpoint ({first_line(error)}): "
            "save the checkpoint again by torch.distributed.checkpoint."
        ) from None
    return content


class _Unpickler(pickle.Unpickler):
    """Admits nothing but what torch puts into .metadata."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        # Where it was saved, which may have been on another system.
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return PurePath
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run any code")
