"""How long `mergekit-karcher merge` takes on larger models and on more machines, by a model.

`python benchmarks/scale.py` measures this machine's rates, predicts a few merges on it from them
and runs those, and predicts what cannot be run here. It writes scale.json and scale.md beside this
file.

The model: work is cut into units of a shard, so many at once; a unit reads, merges and writes at
the same time, as fast as the slowest of the three, where what is shared is divided. Before it comes
start-up:

    T = start-up + units in a row * max(read / rate, merge / rate, write / rate)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from checkpoints import write_checkpoints, write_tokenizer
from ray.cluster_utils import Cluster
from rows import Row, row

RESULTS = Path(__file__).with_suffix(".json")
MEMORY_FILES = Path("/dev/shm")
_SCRIPTS = Path(sysconfig.get_path("scripts"))

_MODELS, _MANY = 3, 17
_SHARD = 5e9  # mergekit's default
_GIGABYTE = 1 << 30

# Run in a process of its own: merges every tensor of a plan, and prints seconds a byte of output.
_MERGE_ALONE = """
import sys, time, torch
from pathlib import Path
from mergekit.options import MergeOptions
from mergekit_karcher.host.merging import Recipe, plan
torch.set_num_threads(1)
config, out = map(Path, sys.argv[1:])
merge = plan(Recipe(config.read_text(), out, MergeOptions(), Path.cwd()))
places = [(place, size) for unit in merge.units for place, size in zip(unit.places, unit.sizes)]
print("ready", flush=True)
sys.stdin.readline()
start = time.perf_counter()
for place, _ in places:
    merge.tensor(place)
print((time.perf_counter() - start) / sum(size for _, size in places))
"""


@dataclass(frozen=True)
class Place:
    """Where a merge runs.

    nodes, workers: machines, and processes on each. read, write, merge: bytes a second of one
    machine for input, of one machine for output, and of one worker for output. shared: of the file
    system for all machines together. start: seconds.
    """

    nodes: int
    workers: int
    read: float
    write: float
    merge: float
    start: float
    shared: float = math.inf


def seconds(place: Place, models: int, output: float, units: int) -> float:
    """The time that the model gives for a merge of so many models to so many bytes of output."""
    at_once = min(units, place.nodes * place.workers)
    in_a_row = math.ceil(units / at_once)
    unit = output / units
    machines = min(place.nodes, at_once)
    reading = min(place.read * machines, place.shared) / at_once
    writing = min(place.write * machines, place.shared) / at_once
    slowest = max(models * unit / reading, unit / place.merge, unit / writing)
    return place.start + in_a_row * slowest


def rates(folder: Path, models: Sequence[Path], config: Path, many: Path) -> dict[str, float]:
    """Bytes a second, and seconds of start-up, each the median of three.

    config, many: of the models, and of `_MANY`.
    """
    files = [path for model in models for path in model.glob("*.safetensors")]
    command = [_SCRIPTS / "mergekit-karcher", "merge", "--help"]
    merge = {count: median(_merging(config, count) for _ in range(3)) for count in (1, 2)}
    return {
        "read from disk": median(_reading(files, evicted=True) for _ in range(3)),
        "read from the page cache": median(_reading(files, evicted=False) for _ in range(3)),
        "write to disk": median(_writing(folder) for _ in range(3)),
        "write to memory": median(_writing(MEMORY_FILES) for _ in range(3)),
        "merge, one worker": merge[1],
        "merge, each of two workers": merge[2],
        f"merge of {_MANY} models, each of two workers": median(
            _merging(many, 2) for _ in range(3)
        ),
        "start-up": median(_timed(command) for _ in range(3)),
    }


def _reading(files: Sequence[Path], *, evicted: bool) -> float:
    if evicted:
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        _timed(["cat", *files])
    return sum(path.stat().st_size for path in files) / _timed(["cat", *files])


def _writing(folder: Path) -> float:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        block = os.urandom(1 << 22)
        start = time.perf_counter()
        for _ in range(_GIGABYTE // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _GIGABYTE / (time.perf_counter() - start)


def _merging(config: Path, count: int) -> float:
    """Bytes of output a second that each of so many processes merges at the same time."""
    command = [sys.executable, "-c", _MERGE_ALONE, config, config.with_suffix(".out")]
    processes = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = [float(process.communicate()[0]) for process in processes]
    return 1 / max(found)


def _timed(command: Sequence[Any]) -> float:
    start = time.perf_counter()
    subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def validated(
    config: Path, output: float, measured: dict[str, float], rounds: int
) -> Iterator[dict[str, Any]]:
    """Merges to memory with one worker, with two, and with a Ray cluster of two nodes."""
    units = 4
    shard = ["--out-shard-size", str(math.ceil(output / units * 1.02)), "--num-threads", "1"]
    for workers in (1, 2):
        merge = measured["merge, one worker" if workers == 1 else "merge, each of two workers"]
        place = Place(
            1,
            workers,
            measured["read from the page cache"],
            measured["write to memory"],
            merge,
            measured["start-up"],
        )
        options = [*shard, "--workers", str(workers)]
        runs = [_merge(config, options) for _ in range(rounds)]
        yield _checked(f"{workers} local", seconds(place, _MODELS, output, units), runs)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        # Each process of Ray imports what the command did, before its first unit.
        place = Place(2, 1, place.read, place.write, place.merge, 2 * place.start)
        runs = [_merge(config, [*shard, "--ray", cluster.address]) for _ in range(rounds)]
        yield _checked("2 Ray nodes", seconds(place, _MODELS, output, units), runs)
    finally:
        cluster.shutdown()


def _merge(config: Path, options: Sequence[str]) -> dict[str, float]:
    """Seconds of a whole run, and from the first byte of output to the last."""
    with tempfile.TemporaryDirectory(dir=MEMORY_FILES) as name:
        out = Path(name, "out")
        command = [_SCRIPTS / "mergekit-karcher", "merge", config, out, *options, "--json-progress"]
        start, moments = time.perf_counter(), []
        with subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{") and json.loads(line)["bytes"] > 0:
                    moments.append(time.perf_counter())
        if process.returncode:
            raise SystemExit(f"{command} failed")
        end = time.perf_counter()
        return {"seconds": end - start, "merging_seconds": end - moments[0]}


def _checked(name: str, predicted: float, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {
        "place": name,
        "predicted_seconds": round(predicted, 2),
        "seconds": [round(run["seconds"], 2) for run in runs],
        "merging_seconds": [round(run["merging_seconds"], 2) for run in runs],
    }


def predicted(measured: dict[str, float], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Large merges on 1, 4 and 16 machines; mergekit's default size of shards."""
    few = measured["merge, each of two workers"]
    many = measured[f"merge of {_MANY} models, each of two workers"]
    for name, models, parameters, merge in (
        ("3 x 70B", _MODELS, 70e9, few),
        ("3 x 405B", _MODELS, 405e9, few),
        ("17 x 24B", _MANY, 24e9, many),
    ):
        output = 2 * parameters
        for nodes in (1, 4, 16):
            place = Place(
                nodes,
                options.workers,
                options.read,
                options.write,
                merge,
                measured["start-up"],
                options.shared,
            )
            units = math.ceil(output / _SHARD)
            yield {
                "merge": name,
                "nodes": nodes,
                "minutes": round(seconds(place, models, output, units) / 60, 1),
                "read_gigabytes": round(models * output / 1e9),
                "written_gigabytes": round(output / 1e9),
                "units": units,
            }


def markdown(rows: Sequence[Row]) -> str:
    """Tables of what was measured, checked and predicted."""
    (rates_row, *others) = rows
    lines = ["# mergekit-karcher merge at scale", "", "## Rates of this machine", ""]
    lines += ["| what | rate |", "| --- | --- |"]
    for name, value in rates_row["result"].items():
        text = f"{value:.1f} s" if name == "start-up" else f"{value / 1e9:.2f} GB/s"
        lines.append(f"| {name} | {text} |")
    for title in ("checked", "predicted"):
        chosen = [row["result"] for row in others if row["contestant"] == title]
        lines += ["", f"## {title.capitalize()}", "", f"| {' | '.join(chosen[0])} |"]
        lines.append(f"|{' --- |' * len(chosen[0])}")
        lines += [f"| {' | '.join(str(value) for value in one.values())} |" for one in chosen]
    machine, case = rates_row["machine"], rates_row["case"]
    lines += ["", f"{case}; {machine}; {rates_row['versions']}; {rates_row['when']}.", ""]
    return "\n".join(lines)


def _config(folder: Path, models: Sequence[Path]) -> Path:
    """A config for the Karcher mean of some models, the first of which gets a tokenizer."""
    write_tokenizer(models[0])
    config = folder / "config.yml"
    inputs = [{"model": str(model)} for model in models]
    config.write_text(
        yaml.safe_dump({"merge_method": "karcher", "models": inputs, "dtype": "bfloat16"})
    )
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--params", type=int, default=1_000_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=16, help="of each machine to predict for")
    parser.add_argument("--read", type=float, default=2e9, help="bytes a second, each machine")
    parser.add_argument("--write", type=float, default=1e9, help="bytes a second, each machine")
    parser.add_argument("--shared", type=float, default=20e9, help="bytes a second, all machines")
    parser.add_argument("--scratch", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="karcher-benchmark-", dir=options.scratch) as name:
        folder = Path(name)
        models, parameters = write_checkpoints(folder, options.params, _MODELS)
        config = _config(folder, models)
        more, _ = write_checkpoints(folder / "many", options.params * _MODELS // _MANY, _MANY)
        many = _config(folder / "many", more)
        os.sync()
        case = {"parameters": f"{parameters / 1e9:.3g}e9", "models": _MODELS, "dtype": "bf16"}
        measured = rates(folder, models, config, many)
        rows = [row("scale", case, "rates", measured)]
        for result in validated(config, 2.0 * parameters, measured, options.rounds):
            rows.append(row("scale", case, "checked", result))
    assumed = {key: getattr(options, key) for key in ("workers", "read", "write", "shared")}
    for result in predicted(measured, options):
        rows.append(row("scale", assumed, "predicted", result))
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(one) for one in rows) + "\n]\n")
    RESULTS.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
