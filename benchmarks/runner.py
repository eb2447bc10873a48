"""`mergekit-karcher merge` against `mergekit-yaml`, and against reading and writing alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import yaml
from checkpoints import write_checkpoints, write_tokenizer
from merges import MODELS, watch, whole_rows
from rows import Row, interleave

MEMORY_FILES = Path("/dev/shm")
YAML, COMMAND = "mergekit-yaml", "mergekit-karcher merge"
COPY = "cat and cp"
START_UP = "start-up"

# Several units of a model that is one file by default.
SHARDS = ("--out-shard-size", "500M")

_SAMPLE_SECONDS = 0.05


def runner(parameters: int, scratch: Path | None, rounds: int) -> Iterator[Row]:
    """Whole processes, inputs in the page cache, output to memory and to disk.

    `cat and cp` reads all inputs once, and writes the size of the output once.
    """
    with tempfile.TemporaryDirectory(prefix="karcher-benchmark-", dir=scratch) as name:
        folder = Path(name)
        models, total = write_checkpoints(folder, parameters, MODELS)
        write_tokenizer(models[0])
        os.sync()
        for place in (MEMORY_FILES, folder):
            with tempfile.TemporaryDirectory(prefix="karcher-benchmark-", dir=place) as where:
                calls = {
                    f"{command} {method}{shards}": partial(
                        _merge, command, method, SHARDS if shards else (), models, Path(where)
                    )
                    for command, method, shards in (
                        (YAML, "linear", ""),
                        (YAML, "karcher", ""),
                        (COMMAND, "linear", ""),
                        (COMMAND, "karcher", ""),
                        (COMMAND, "linear", ", 4 shards"),
                        (COMMAND, "karcher", ", 4 shards"),
                    )
                }
                calls[COPY] = partial(_copy, models, Path(where))
                for command in (YAML, COMMAND):
                    calls[f"{START_UP} of {command}"] = partial(_start, command, Path(where))
                case = {
                    "parameters": f"{total / 1e9:.3g}e9",
                    "models": MODELS,
                    "output": "memory" if place == MEMORY_FILES else "disk",
                }
                runs = interleave(calls, dict.fromkeys(calls, rounds))
                yield from whole_rows(case, runs, "runner")


def _merge(
    command: str, method: str, options: Sequence[str], models: Sequence[Path], where: Path
) -> dict[str, float]:
    out, config = where / "out", where / "config.yml"
    inputs = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    config.write_text(
        yaml.safe_dump({"merge_method": method, "models": inputs, "dtype": "bfloat16"})
    )
    words = [str(config), str(out), *options]
    try:
        return _watch(command, words, where / "log")
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _start(command: str, where: Path) -> dict[str, float]:
    return _watch(command, ["--help"], where / "log")


def _watch(command: str, words: Sequence[str], log: Path) -> dict[str, float]:
    """Run a command, and sample its memory and that of its largest child process."""
    name, *subcommand = command.split()
    largest = {"anonymous": 0}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            for pid in _descendants(os.getpid()):
                largest["anonymous"] = max(largest["anonymous"], _anonymous(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        measured = watch(
            [*subcommand, *words], log, os.environ | {"HF_HUB_OFFLINE": "1"}, command=name
        )
    finally:
        ended.set()
        thread.join()
    return measured | {"largest_process_anonymous_mb": largest["anonymous"] / 1e6}


def _descendants(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:  # The thread has ended.
            continue
        for child in map(int, children):
            yield child
            yield from _descendants(child)


def _anonymous(pid: int) -> int:
    """Bytes of memory of a process that no file stands behind."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # It has ended.
        return 0
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(sizes[0]) if sizes else 0


def _copy(models: Sequence[Path], where: Path) -> dict[str, float]:
    files = [str(path) for model in models for path in sorted(model.glob("*.safetensors"))]
    own = [path for path in files if path.startswith(f"{models[0]}/")]
    (where / "out").mkdir()
    start = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    subprocess.run(["cp", *own, where / "out"], check=True)
    subprocess.run(["sync", "-f", where / "out"], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(where / "out")
    return {"seconds": seconds, "load_average": os.getloadavg()[0]}
