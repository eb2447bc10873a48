"""Faults at random points of `mergekit-karcher merge`: is the result the same after the cure?

`python benchmarks/faults.py` writes faults.json and faults.md beside this script; kinds of faults
that were not run keep the rows that are there. Linux only: a full disk is a small tmpfs, mounted in
a namespace of this process (`unshare -rm`).
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

# All models are local, and a process that was asked to reach a Hub could wait for it.
os.environ["HF_HUB_OFFLINE"] = "1"

import psutil
import torch
from checkpoints import write_checkpoints, write_tokenizer
from disturbed import STEP_SECONDS, WORKERS, Merge, ended_before
from merges import SCRIPTS
from processes import end_of
from rows import Row, quantiles, row
from safetensors import safe_open

_RESULTS = Path(__file__).with_suffix(".json")
_NAMESPACE = "KARCHER_FAULTS_NAMESPACE"
_SEED = 0
_GRANULARITIES = ("tensor", "model")
_MODELS, _SHARDS = 3, 8
_UNIT_SECONDS = 0.3
_TENSORS = "tensors equal to those of mergekit-yaml"

# After so many points an undisturbed run is measured again, as others may use the machine too.
_AGAIN = 5
_PAGE = 4096

Point = dict[str, Any]


def _cured(merge: Merge) -> bool:
    """Whether the same command, run again, leaves what an undisturbed run leaves."""
    return merge.run() == 0 and merge.same_bytes()


def _told(merge: Merge, *words: str) -> bool:
    """Whether a run has ended with one sentence that has any of those words."""
    error = merge.error()
    if error is not None and any(word in error for word in words):
        return True
    print(merge.log.read_text()[-3000:], file=sys.stderr, flush=True)
    return False


def kill_driver(merge: Merge, draw: random.Random) -> Point | None:
    """SIGKILL for the process that was started; its workers see that it is gone."""
    process = merge.start()
    if ended_before(process, draw.uniform(0, merge.seconds)) is not None:
        return None
    os.kill(process, signal.SIGKILL)
    if end_of(process) != -signal.SIGKILL:
        return None
    point = {"phase": merge.phase(), "loads_though_not_whole": merge.loads_though_not_whole()}
    ended = (merge.out / "config.json").exists() and not (merge.out / ".merge" / "whole").exists()
    return point | {"same": not point["loads_though_not_whole"] if ended else _cured(merge)}


def kill_worker(merge: Merge, draw: random.Random) -> Point | None:
    """SIGKILL for one of the workers; the run itself has to go on to its end."""
    process = merge.start()
    workers = []
    if ended_before(process, draw.uniform(0, merge.seconds)) is None:
        workers = psutil.Process(process).children()
        if workers:
            draw.choice(workers).kill()
            phase = merge.phase()
        code = end_of(process)
    return {"phase": phase, "same": code == 0 and merge.same_bytes()} if workers else None


def fill_disk(merge: Merge, draw: random.Random) -> Point | None:
    """Nothing left on the disk of the output, a tmpfs, until the file that fills it is deleted."""
    ballast = merge.out.with_name("ballast")
    process = merge.start()
    code = ended_before(process, draw.uniform(0, merge.seconds))
    if code is None:
        _fill(ballast)
        phase, code = merge.phase(), end_of(process)
        ballast.unlink()
    if code == 0:
        return None
    point = {"phase": phase, "loads_though_not_whole": merge.loads_though_not_whole()}
    told = _told(merge, "free some", "No space left")
    return point | {"sentence": told, "same": _cured(merge)}


def _fill(ballast: Path) -> None:
    with ballast.open("wb") as file:
        size = 0
        while free := shutil.disk_usage(ballast.parent).free:
            try:
                os.posix_fallocate(file.fileno(), size, free)
            except OSError as error:  # A worker has taken some in the meantime.
                if error.errno != errno.ENOSPC:
                    raise
            else:
                size += free


def truncate_input(merge: Merge, draw: random.Random) -> Point | None:
    """One shard of an input loses its end while it may be read, until it is put back."""
    path = draw.choice(sorted(draw.choice(merge.models).glob("*.safetensors")))
    size = path.stat().st_size
    # Less than a page is read as zeros where the file is mapped; more ends the process.
    cut = draw.randrange(1, draw.choice((_PAGE, size)))
    with _put_back(path):
        process = merge.start()
        code = ended_before(process, draw.uniform(0, merge.seconds))
        if code is None:
            os.truncate(path, size - cut)
            phase, code = merge.phase(), end_of(process)
    if code == 0:
        return None
    point = {"phase": phase, "loads_though_not_whole": merge.loads_though_not_whole()}
    return point | {"sentence": _told(merge, str(path)), "same": _cured(merge)}


def change_input(merge: Merge, draw: random.Random) -> Point | None:
    """A driver is killed, a byte of an input changes, and the next run has to refuse it."""
    path = draw.choice(sorted(draw.choice(merge.models).glob("*.safetensors")))
    process = merge.start()
    if ended_before(process, draw.uniform(0, merge.seconds)) is not None:
        return None
    os.kill(process, signal.SIGKILL)
    end_of(process)
    phase = merge.phase()
    if phase in ("planning", "publishing"):  # Nothing is begun yet, or nothing more is read.
        return None
    with _put_back(path):
        with path.open("rb+") as file:
            file.seek(-draw.randrange(1, 1000), os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        told = merge.run() == 1 and _told(merge, str(path))
    return {"phase": phase, "sentence": told, "same": _cured(merge)}


@contextmanager
def _put_back(path: Path) -> Iterator[None]:
    """Put a file back as it was, with its time, when the block ends."""
    kept = path.with_name("kept")
    shutil.copy2(path, kept)
    try:
        yield
    finally:
        shutil.copyfile(kept, path)
        shutil.copystat(kept, path)
        kept.unlink()


def two_drivers(merge: Merge, draw: random.Random) -> Point | None:
    """The same command a second time while the first one runs; it has to be refused."""
    first = merge.start()
    if ended_before(first, draw.uniform(0, merge.seconds)) is not None:
        return None
    phase, log = merge.phase(), merge.log.with_name("second")
    codes = [end_of(process) for process in (merge.start(log=log), first)]
    logs = (log, merge.log)
    told = sorted(codes) == [0, 1] and merge.error(logs[codes.index(1)]) is not None
    return {"phase": phase, "sentence": told, "same": merge.same_bytes()}


def lose_node(nodes: Any, merge: Merge, draw: random.Random) -> Point | None:
    """SIGKILL for all of one node of a Ray cluster; the run itself has to go on to its end."""
    shards = sum(name.endswith(".safetensors") for name in merge.expected)
    units = draw.randrange(2 * shards if merge.granularity == "model" else shards)
    process = merge.start()
    while len(list(merge.out.glob(".merge/*.done"))) < units:
        if ended_before(process, STEP_SECONDS) is not None:
            return None
    if ended_before(process, draw.uniform(0, _UNIT_SECONDS)) is not None:
        return None
    nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    phase, code = merge.phase(), end_of(process, 300)
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    return {"phase": phase, "same": code == 0 and merge.same_bytes()}


@contextmanager
def _cluster(nodes: int) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    settings = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**settings)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# Each by its name on the command line: what it is called, how, and at how many points in all.
FAULTS: dict[str, tuple[str, Callable[..., Point | None], int]] = {
    "worker": ("kill -9 of a worker", kill_worker, 100),
    "driver": ("kill -9 of the driver", kill_driver, 100),
    "disk": ("a full disk", fill_disk, 30),
    "truncated": ("a truncated input shard", truncate_input, 30),
    "changed": ("an input that changes between runs", change_input, 20),
    "drivers": ("two drivers on one folder", two_drivers, 20),
    "node": ("a Ray node that is removed", lose_node, 6),
}


def strike(title: str, fault: Callable[..., Point | None], merge: Merge, count: int) -> Point:
    """Counts over as many points as were asked for; those that met no running merge are extra."""
    draw = random.Random(f"{_SEED} {title} {merge.granularity}")
    points: list[Point] = []
    missed = 0
    seconds = []
    while len(points) < count:
        if not seconds or len(points) >= _AGAIN * len(seconds):
            merge.measure()
            seconds.append(merge.seconds)
        merge.clear()
        point = fault(merge, draw)
        if point is None:
            missed += 1
            continue
        points.append(point)
        print(title, merge.granularity, len(points), point, file=sys.stderr, flush=True)
        if not point["same"]:
            print(merge.log.read_text()[-3000:], file=sys.stderr, flush=True)
    merge.clear()
    told = {"sentences": sum(p["sentence"] for p in points)} if "sentence" in points[0] else {}
    return told | {
        "points": count,
        "missed": missed,
        "same": sum(point["same"] for point in points),
        "load_though_not_whole": sum(p.get("loads_though_not_whole", False) for p in points),
        "phases": dict(Counter(point["phase"] for point in points)),
        "seconds": quantiles(seconds),
    }


def tensors_of_mergekit_yaml(merge: Merge) -> Point:
    """How many tensors there are, and how many of them are the same in an undisturbed run."""
    theirs = merge.out.with_name("theirs")
    command = [SCRIPTS / "mergekit-yaml", merge.config, theirs, "--num-threads", "1", "--quiet"]
    subprocess.run(command, check=True, timeout=600)
    merge.clear()
    merge.run()
    ours, expected = (dict(_tensors(folder)) for folder in (merge.out, theirs))
    shutil.rmtree(theirs)
    merge.clear()
    same = sum(
        name in ours and ours[name].dtype == t.dtype and torch.equal(ours[name], t)
        for name, t in expected.items()
    )
    return {"points": len(expected), "same": same if ours.keys() == expected.keys() else 0}


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def measure(kinds: list[str], parameters: int, share: float, scratch: Path | None) -> Iterator[Row]:
    """A row for each kind of fault and granularity. share: of the points of `FAULTS`."""
    torch.set_num_threads(1)  # A process with threads of OpenMP cannot be forked.
    with tempfile.TemporaryDirectory(prefix="karcher-faults-", dir=scratch) as name:
        folder = Path(name)
        models, true = write_checkpoints(folder, parameters, _MODELS)
        for model in models:
            write_tokenizer(model)
        output = 2 * true
        case = {"parameters": f"{true / 1e9:.3g}e9", "models": _MODELS, "dtype": "bf16"}
        for granularity in _GRANULARITIES:
            of_granularity = case | {"granularity": granularity}
            usual = (models, granularity, output // _SHARDS)
            merge = Merge(folder, *usual)
            result = tensors_of_mergekit_yaml(merge)
            yield row("faults", of_granularity, _TENSORS, result)
            for kind in kinds:
                title, fault, count = FAULTS[kind]
                points = max(1, round(share * count / len(_GRANULARITIES)))
                with ExitStack() as stack:
                    place = merge
                    if kind == "disk":
                        disk = stack.enter_context(_small_disk(folder / "disk", 2 * output))
                        place = Merge(disk, *usual)
                    elif kind == "node":
                        nodes = stack.enter_context(_cluster(2))
                        place = Merge(folder, *usual, "--ray", nodes.address)
                        fault = functools.partial(fault, nodes)
                    if place.expected != merge.expected:
                        raise RuntimeError(f"Undisturbed runs differ for {title}.")
                    result = strike(title, fault, place, points)
                yield row("faults", of_granularity, title, result)


def table(rows: list[Row]) -> str:
    """A line for each kind of fault and granularity."""
    phases = list(dict.fromkeys(p for r in rows for p in r["result"].get("phases", ())))
    header = ["fault", "granularity", "points", "same bytes", "one sentence", *phases]
    lines = [header, ["---"] * len(header)]
    for r in rows:
        result = r["result"]
        counts = [result.get("phases", {}).get(phase, "") for phase in phases]
        first = [r["contestant"], r["case"]["granularity"], result["points"], result["same"]]
        lines.append([*first, result.get("sentences", ""), *counts])
    body = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    about = {**rows[0]["machine"], **rows[0]["versions"], "ray": version("ray")}
    case = rows[0]["case"]
    wrong = sum(r["result"].get("load_though_not_whole", 0) for r in rows)
    seconds = [
        f"{r['result']['seconds']['median']:.2g}"
        for r in rows
        if r["contestant"] == FAULTS["driver"][0]
    ]
    return (
        "# Merges that are disturbed\n\n"
        f"`mergekit-karcher merge` of {case['models']} models of {case['parameters']} parameters "
        f"in {case['dtype']}, {WORKERS} workers, {_SHARDS} shards or a few more; "
        f"{' and '.join(seconds)} s from the fork of a process that has imported "
        "everything to the end of an undisturbed run (medians). A fault comes at a random point of "
        f"that time, seed {_SEED}. Same bytes: after the cure, all files are as an undisturbed run "
        "leaves them. A worker or node that is lost is no reason to stop; all else is cured (space "
        "on the disk, the input put back as it was) and the same command run again. One sentence: "
        "the run was refused or stopped by one error that says what to do. The other columns: what "
        "was going on. A node is removed when a random number of units is done; its runs start "
        "fresh processes. The full disk is a tmpfs that another file fills. "
        f"Of all folders that were left in between, {wrong} had a config and were not whole.\n\n"
        f"{body}\n\n{', '.join(f'{k} {v}' for k, v in about.items())}; "
        f"{min(r['when'] for r in rows)} to {max(r['when'] for r in rows)}.\n"
    )


def _place(row: Row) -> tuple[int, int]:
    """Where a row stands in the table."""
    titles = [_TENSORS, *(title for title, *_ in FAULTS.values())]
    return _GRANULARITIES.index(row["case"]["granularity"]), titles.index(row["contestant"])


def main() -> None:
    """Do what was asked for, and write after each kind of fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and small, to see that it works")
    parser.add_argument("--only", choices=FAULTS, nargs="+", default=list(FAULTS))
    parser.add_argument("--scratch", type=Path, help="where the models may lie for a while")
    options = parser.parse_args()
    if _NAMESPACE not in os.environ:
        os.environ[_NAMESPACE] = "1"
        os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])
    rows = json.loads(_RESULTS.read_text()) if _RESULTS.is_file() and not options.quick else []
    parameters, share = (10_000_000, 0.04) if options.quick else (200_000_000, 1.0)
    for new in measure(options.only, parameters, share, options.scratch):
        rows = [r for r in rows if (r["contestant"], r["case"]) != (new["contestant"], new["case"])]
        rows = sorted([*rows, new], key=_place)
        if not options.quick:
            _RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
            _RESULTS.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
