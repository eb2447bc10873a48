"""Shards in the safetensors format, written tensor by tensor while the next one is merged."""

from __future__ import annotations

import json
import os
import uuid
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash

from mergekit_karcher.files import PARTIAL, sync_folder
from mergekit_karcher.host.headers import WORDS

# Bytes of tensors that may wait to be written while the next one is merged.
_WAITING_BYTES = 1 << 27

# Bytes that are hashed while they are in the cache, and then written.
_BLOCK = 1 << 22

# After so many bytes the disk is waited for, so that little is left to wait for at the end.
_SYNC_BYTES = 1 << 28

# What the header entry of a tensor takes beside its name: dtype, shape and offsets.
_ENTRY_BYTES = 256
_HEADER_ALIGNMENT = 4096


@dataclass(frozen=True)
class Written:
    """A shard on disk.

    bytes, tensor_bytes: the size of the file and of what its tensors take. checksum: XXH3 of all of
    it. tensors: their names.
    """

    bytes: int
    tensor_bytes: int
    checksum: str
    tensors: tuple[str, ...]


class ShardWriter:
    """Writes one shard beside its final name, which it gets when it is whole and on the disk.

    Room for the header is kept at the start, by the names alone, and the header is written last:
    so each tensor is written when it comes. Equal tensors in equal order give equal bytes.

    Arguments:
        path: The final name.
        names: Every tensor that may come.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        room = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names) + _ENTRY_BYTES
        self._header_bytes = -(-room // _HEADER_ALIGNMENT) * _HEADER_ALIGNMENT - 8
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._end = self._unsynced = 0
        self._hash = xxhash.xxh3_128()
        self._waiting: deque[tuple[Future[None], int]] = deque()

    def __enter__(self) -> ShardWriter:
        self._file = self._partial.open("xb", buffering=0)
        self._file.seek(8 + self._header_bytes)
        self._thread = ThreadPoolExecutor(1, "mergekit-karcher-writer")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a contiguous CPU tensor, which must not be changed; returns before it is written.

        At most `_WAITING_BYTES` wait; a larger tensor is waited for.

        Raises:
            OSError: If the disk is full or fails, for this tensor or one before.
        """
        size = tensor.numel() * tensor.element_size()
        self._header[name] = {
            "dtype": WORDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._end, self._end + size],
        }
        self._end += size
        self._waiting.append((self._thread.submit(self._write, tensor), size))
        self._wait_until(_WAITING_BYTES)

    def finish(self) -> Written:
        """Write the header, wait for the disk, and give the shard its name.

        Raises:
            OSError: If the disk is full or fails.
        """
        self._wait_until(0)
        header = json.dumps(self._header, separators=(",", ":")).encode()
        header = self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes)
        self._hash.update(header)
        self._file.seek(0)
        self._write_all(memoryview(header))
        os.fsync(self._file.fileno())
        os.replace(self._partial, self._path)
        sync_folder(self._path.parent)
        names = tuple(name for name in self._header if name != "__metadata__")
        return Written(len(header) + self._end, self._end, self._hash.hexdigest(), names)

    def _wait_until(self, left: int) -> None:
        """Wait until at most so many bytes are left to write."""
        while self._waiting and sum(size for _, size in self._waiting) > left:
            self._waiting.popleft()[0].result()

    def _write(self, tensor: torch.Tensor) -> None:
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            self._hash.update(block)
            self._write_all(block)
        self._unsynced += len(data)
        if self._unsynced >= _SYNC_BYTES:
            os.fsync(self._file.fileno())
            self._unsynced = 0

    def _write_all(self, block: memoryview) -> None:
        while block:
            block = block[self._file.write(block) :]


def is_whole(path: Path, written: Written) -> bool:
    """Whether a shard is on disk as it was written. Reads all of it."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != written.bytes:
                return False
            start = file.read(8)
            header = start + file.read(int.from_bytes(start, "little"))
            found = xxhash.xxh3_128()
            while block := file.read(_BLOCK):
                found.update(block)
            found.update(header)
    except FileNotFoundError:
        return False
    return bool(found.hexdigest() == written.checksum)
