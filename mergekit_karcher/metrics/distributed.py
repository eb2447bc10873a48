"""Adam's second moments in a checkpoint of torch.distributed, none of whose pickles is trusted.

It is a folder of .distcp shards and a pickle, `.metadata`, that says what lies where. torch reads
that pickle, and all values but tensors, without restriction: here readers of ours read both.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from enum import Enum, EnumMeta
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
_ADMITTED = {
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (filesystem.__name__, "_StorageInfo"),
    *((metadata.__name__, name) for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")),
}
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


def distributed_moments(folder: Path) -> Iterator[tuple[str, Moments]]:
    """The name of every parameter as the checkpoint has it, and its moments, in new tensors.

    Raises KarcherError if the folder cannot be read, is not Adam's or does not say its settings, or
    if one of its pickles asks for more than a checkpoint of torch holds.
    """
    checkpoint = _Checkpoint(folder)
    moments = {key: match[1] for key in checkpoint.entries if (match := _MOMENT.fullmatch(key))}
    if not moments:
        raise KarcherError(
            f"{folder} has no exp_avg_sq of a named parameter: only checkpoints of Adam and AdamW "
            "keep the second moments that are needed."
        )
    settings = checkpoint.values([key for key in checkpoint.entries if _SETTING.search(key)])
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
        values = checkpoint.values([key, step])
        yield name, Moments(values[key], float(values[step]), float(*beta2), float(*eps))


class _Checkpoint(FileSystemReader):
    """torch's reader of a folder, which reads the metadata once, by `_Unpickler`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder, self.metadata = folder, _read_metadata(folder / ".metadata")
        self.entries = self.metadata.state_dict_metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata

    def values(self, names: Sequence[str]) -> dict[str, Any]:
        """The values of some entries, in new tensors on the CPU or as plain numbers and tuples."""
        values: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            if isinstance(entry := self.entries[name], TensorStorageMetadata)
            else None
            for name in names
        }
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with warnings.catch_warnings():
            # About the process group that one process does not have.
            warnings.simplefilter("ignore")
            try:
                load(values, storage_reader=self, planner=planner, no_dist=True)
            # It is no Exception, and only says what went wrong in each process.
            except CheckpointException as error:
                cause = next((failure[0] for failure in error.failures.values()), error)
                if isinstance(cause, KeyboardInterrupt):
                    raise cause from None
                raise KarcherError(
                    f"{names[0]} of {self.folder} cannot be read ({first_line(cause)}): save the "
                    "checkpoint again, with nothing but tensors and numbers in the optimizer's "
                    "state."
                ) from None
        return values


class _Planner(DefaultLoadPlanner):
    """torch's planner, which would unpickle whatever is no tensor without any restriction."""

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
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _ADMITTED:
            return super().find_class(module, name)
        # Where it was saved, which may have been on another system.
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return PurePath
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run any code")


def _member(owner: object, name: str) -> Enum:
    """The member of an admitted enum; Python 3.11.0 to 3.11.3 pickle it as a call of getattr."""
    if not (isinstance(owner, EnumMeta) and name in owner.__members__):
        raise pickle.UnpicklingError(f"it asks for {name} of {owner}, which could run any code")
    member: Enum = owner[name]
    return member
