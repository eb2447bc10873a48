"""One merge by `mergekit-karcher merge`, run again and again, and what it leaves behind."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import xxhash
import yaml

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from merges import SCRIPTS
from processes import end_of, fork

from mergekit_karcher.cli import merge as _imported_before_forks  # noqa: F401

WORKERS = 2
STEP_SECONDS = 0.002

_COMMAND = SCRIPTS / "mergekit-karcher"


class Merge:
    """One merge that is run again and again by forks of this process.

    Arguments:
        folder: What is written goes there.
        models: The inputs.
        granularity: Of the mean.
        shard: Bytes of a shard at most.
        options: More of the command.

    expected: a hash of each file that an undisturbed run leaves. seconds: its time from the fork to
    the end, when it was last measured.
    """

    def __init__(
        self, folder: Path, models: list[Path], granularity: str, shard: int, *options: str
    ) -> None:
        self.config, self.log = folder / f"{granularity}.yml", folder / "log"
        self.out = folder / "merged"
        self.models, self.granularity = models, granularity
        workers = options or ("--workers", WORKERS)
        self._options = ("--num-threads", 1, "--out-shard-size", shard, *workers)
        document = {
            "merge_method": "karcher",
            "models": [
                {"model": str(m), "parameters": {"weight": 1 + i}} for i, m in enumerate(models)
            ],
            "parameters": {"granularity": granularity},
            "dtype": "bfloat16",
        }
        self.config.write_text(yaml.safe_dump(document))
        self.expected: dict[str, str] = {}
        self.measure()

    def measure(self) -> None:
        """Run undisturbed; raises if that fails, or does not leave what it left before."""
        self.clear()
        begin = time.monotonic()
        if self.run():
            raise RuntimeError(self.log.read_text())
        self.seconds = time.monotonic() - begin
        left = self.files()
        self.expected = self.expected or left
        different = {name for name, _ in left.items() ^ self.expected.items()}
        if different:
            raise RuntimeError(f"Undisturbed runs differ in {different}:\n{self.log.read_text()}")

    def start(self, log: Path | None = None) -> int:
        """Fork; the id of the driver's process."""
        arguments = ["merge", self.config, self.out, *self._options]
        prepare = functools.partial(_start_afresh, arguments) if "--ray" in arguments else None
        return fork(arguments, log or self.log, prepare)

    def run(self) -> int:
        """Run to the end; the exit code."""
        return end_of(self.start(), 300)

    def files(self) -> dict[str, str]:
        """A hash of each file in the output folder, by its path there."""
        paths = [path for path in self.out.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.out)): _hash(path) for path in sorted(paths)}

    def clear(self) -> None:
        """Delete the output folder, even while a worker of a killed driver ends."""
        while self.out.exists():
            shutil.rmtree(self.out, ignore_errors=True)

    def same_bytes(self) -> bool:
        """Whether the output folder is what an undisturbed run leaves."""
        return self.files() == self.expected

    def error(self, log: Path | None = None) -> str | None:
        """The one sentence that a run ended with, if it is that."""
        said = (log or self.log).read_text()
        lines = [line for line in said.splitlines() if line.startswith("Error: ")]
        known = len(lines) == 1 and "Traceback" not in said and "does not know" not in said
        return lines[0] if known else None

    def phase(self) -> str:
        """What was done when a run was stopped, by the files that it left."""
        work = self.out / ".merge"
        done = sorted(path.name for path in work.glob("*.done"))
        shards = sum(name.endswith(".safetensors") for name in self.expected)
        if (work / "whole").exists() or (self.out / "config.json").exists():
            return "publishing"
        if not (work / "manifest.json").exists():
            return "planning"
        if len([name for name in done if name.startswith("model")]) == shards:
            return "config, tokenizer and card"
        inner = self.granularity == "model" and not list(work.glob("*/model*.partial"))
        if inner and len([name for name in done if name.startswith("products")]) < shards:
            return "inner products"
        return "shards"

    def loads_though_not_whole(self) -> bool:
        """Whether the output folder has a config, but not all that an undisturbed run leaves."""
        if not (self.out / "config.json").exists():
            return False
        left = self.files()
        return any(left.get(name) != content for name, content in self.expected.items())


def _start_afresh(arguments: list[Any]) -> None:
    """Become a new process of our command: a fork of one that has imported Ray cannot use it."""
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)
    os.execv(_COMMAND, [str(argument) for argument in (_COMMAND, *arguments)])


def _hash(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def ended_before(process: int, seconds: float) -> int | None:
    """Wait so long; the exit code if the process has ended by then."""
    stop = time.monotonic() + seconds
    while (left := stop - time.monotonic()) > 0:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(left, STEP_SECONDS))
    return None
