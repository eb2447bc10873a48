"""One way to write a file or a folder so that it is whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a file or folder that is still being written ends in.
PARTIAL = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary place beside path, which becomes path when the block ends well.

    Arguments:
        path: A file, which is replaced if it is there, or a folder, which must not be there yet.
            Its parent must exist.

    Yields:
        Where to write the file or make the folder: path with `PARTIAL` at its end. Whatever an
        earlier run has left there is deleted first; after an error in the block nothing stays.

    Raises:
        OSError: If the disk is full, or the place cannot be written to.
    """
    partial = path.with_name(f"{path.name}{PARTIAL}")
    _delete(partial)
    try:
        yield partial
        if partial.is_file():
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        _delete(partial)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Arguments:
        path: The file, replaced if it is there.
        text: All of it.

    Raises:
        OSError: If the disk is full, or the place cannot be written to.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder, where the system can do that."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
