"""The folder that a merge goes to: empty before, in use by one run, whole after it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import PARTIAL, sync_folder, write_text
from mergekit_karcher.runner.shards import Written

# The folder within the output that holds what is done of a merge.
WORK = ".merge"
_LOCK = "lock"
# What a file ends in that is locked while a worker does a unit.
_BUSY = ".busy"
# A file that says that all is done, and only has to be moved.
_WHOLE = "whole"

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
# What makes a folder load, in the order in which it may appear.
_LAST = (_INDEX, _CONFIG)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")

# Workers of a run that was killed may live for a moment.
_LOCK_SECONDS = 3

_SHOWN = 3


def check_free(out: Path) -> None:
    """Raise `KarcherError` if an output folder holds anything but a merge that was begun."""
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    others = [name for name in names if name != WORK]
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        raise KarcherError(
            f"{out} holds other files ({', '.join(others[:_SHOWN])}{more}): give another folder, "
            "or --overwrite to replace the model in it."
        )


def is_finished(out: Path) -> bool:
    """Whether a folder holds a whole model, and no merge that was begun."""
    return (
        not (out / WORK).exists()
        and (out / _CONFIG).is_file()
        and any(file for pattern in _WEIGHTS for file in out.glob(pattern))
    )


@contextmanager
def in_use(out: Path) -> Iterator[Path]:
    """Make the working folder of an output folder, for this run alone.

    Yields:
        The working folder. It stays for the next run unless `publish` has moved all that is in it.
        An output folder that this has made goes again if nothing came of the merge.

    Raises:
        KarcherError: If another run has it, or it cannot be written to.
    """
    work, is_new = out / WORK, not out.exists()
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / _LOCK)
        lock.acquire(timeout=_LOCK_SECONDS)
        for busy in work.glob(f"*{_BUSY}"):
            FileLock(busy).acquire(timeout=_LOCK_SECONDS).lock.release()
    except Timeout:
        raise KarcherError(
            f"Another merge is writing to {out}: wait for its end, or stop it."
        ) from None
    except OSError as error:
        raise KarcherError(f"{out} cannot be written to: {error.strerror}.") from None
    try:
        delete_partial(work)
        yield work
    finally:
        lock.release()
        if not any(path.name != _LOCK for path in work.iterdir()):
            shutil.rmtree(work)
            if is_new and not any(out.iterdir()):
                out.rmdir()


def doing(unit: str, work: Path) -> FileLock:
    """What a worker holds while it does a unit.

    A worker may live a moment longer than the run that started it. Until then the next run waits.
    """
    return FileLock(work / f"{unit}{_BUSY}")


def delete_partial(work: Path) -> None:
    """Delete what processes that were killed have left half-written."""
    for partial in work.rglob(f"*{PARTIAL}"):
        partial.unlink()


def check_space(folder: Path, needed: int) -> None:
    """Raise `KarcherError` unless a folder can be written to, and so many bytes fit on its disk.

    folder: may be missing; then the nearest one above it counts.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise KarcherError(f"{there} cannot be written to: mend its permissions, or give another.")
    free = shutil.disk_usage(there).free
    if free < needed:
        raise KarcherError(
            f"The disk of {there} has {free / 1e9:.3g} GB free, and the merge needs "
            f"{needed / 1e9:.3g} GB: free some, or give a folder on another disk."
        )


def begin_anew(work: Path) -> None:
    """Delete what an earlier run has done, but for the lock.

    The word that all is done goes last: until then, moving the result can be done again.
    """
    for path in sorted(work.iterdir(), key=lambda path: path.name == _WHOLE):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def write_index(folder: Path, shards: Iterable[tuple[str, Written]]) -> None:
    """Write the index of a model in several shards."""
    shards = list(shards)
    if len(shards) < 2:
        return
    total = sum(written.tensor_bytes for _, written in shards)
    weights = {name: shard for shard, written in shards for name in written.tensors}
    content = {"metadata": {"total_size": total}, "weight_map": weights}
    write_text(folder / _INDEX, json.dumps(content, indent=2) + "\n")


def to_publish(work: Path) -> tuple[str, Path] | None:
    """What an earlier run has left to move: the hash of its config, and the whole model."""
    path = work / _WHOLE
    if not path.is_file():
        return None
    config, name = path.read_text(encoding="utf-8").split(maxsplit=1)
    return config, work / name


def publish(model: Path, work: Path, config: str) -> None:
    """Move a whole model to the output folder, out of the working folder in it.

    The old weights there are deleted first. What makes the folder load comes last: if this is
    interrupted, doing it again ends it.

    config: the hash of the config of that model.
    """
    out = work.parent
    if to_publish(work) is None:
        _sync_files(model)
        write_text(work / _WHOLE, f"{config} {model.name}")
        sync_folder(work)
        (out / _CONFIG).unlink(missing_ok=True)
        for pattern in _WEIGHTS:
            for path in out.glob(pattern):
                path.unlink()
    names = os.listdir(model) if model.is_dir() else []
    for name in sorted(names, key=lambda name: _LAST.index(name) + 1 if name in _LAST else 0):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        os.replace(model / name, out / name)
    sync_folder(out)
    begin_anew(work)


def _sync_files(folder: Path) -> None:
    """Wait until the disk has what mergekit wrote."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
