"""The files that a merge reads: what tells that one has changed, and asking for them ahead."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mergekit_karcher.errors import KarcherError

# What of another file is hashed in the place of a header.
_START_BYTES = 1 << 16

_NO_HEADER = "is no whole safetensors file"


class Fingerprint(NamedTuple):
    """What is compared to tell whether a file has changed: bytes, nanoseconds, and a hash."""

    bytes: int
    modified: int
    header: str


def fingerprint(path: Path) -> Fingerprint:
    """That of an input file, by the header of safetensors or the start of another format.

    Raises:
        KarcherError: If the file is not there, or shorter than its header says.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if path.suffix != ".safetensors":
                start = file.read(_START_BYTES)
                return Fingerprint(status.st_size, status.st_mtime_ns, _digest(start))
            length = file.read(8)
            header = file.read(min(int.from_bytes(length, "little"), status.st_size))
    except OSError as error:
        raise KarcherError(f"{path} cannot be read: {error.strerror}.") from None
    _check_length(path, header, status.st_size)
    return Fingerprint(status.st_size, status.st_mtime_ns, _digest(length + header))


def _check_length(path: Path, header: bytes, size: int) -> None:
    try:
        ends = [entry["data_offsets"][1] for _, entry in _entries(header)]
    except (ValueError, KeyError, UnicodeDecodeError):
        raise KarcherError(f"{path} {_NO_HEADER}: fetch or save it again.") from None
    needed = 8 + len(header) + max(ends, default=0)
    if size != needed:
        raise KarcherError(
            f"{path} is {size} bytes long and must be {needed} by its header: fetch or save it "
            "again."
        )


def _entries(header: bytes) -> Iterable[tuple[str, dict[str, list[int]]]]:
    named = json.loads(header)
    return [(name, entry) for name, entry in named.items() if name != "__metadata__"]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_ahead(tensors: Iterable[tuple[Path, str]]) -> None:
    """Ask the operating system to read tensors from disk, and do not wait for it."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path, name in tensors:
        if path.suffix == ".safetensors":
            start, stop = _places(path)[name]
            file = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(file, start, stop - start, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)


@cache
def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Where in a file each tensor begins and ends."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = _entries(file.read(length))
    begin = 8 + length
    return {
        name: (begin + entry["data_offsets"][0], begin + entry["data_offsets"][1])
        for name, entry in entries
    }
