"""Whole `mergekit-yaml` runs: wall time, processor time and peak memory of the process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from checkpoints import write_checkpoints, write_metric, write_tokenizer
from contestants import BUILTIN, LINEAR, OURS
from rows import Row, interleave, quantiles, timed_rows

MODELS = 3
MERGE, REPORT, REPORTING = "merge", "report", "merge that reports"
START_UP = "start-up"

SCRIPTS = Path(sysconfig.get_path("scripts"))
WHOLE_MODEL = f"{OURS}, model"
PLAIN_LOOP = "plain loop"
FISHER, IN_METRIC, ROWS_IN_METRIC = "fisher", f"{OURS}, metric", f"{OURS}, row, metric"
_METHODS = {OURS: "karcher", WHOLE_MODEL: "karcher", LINEAR: "linear", BUILTIN: "karcher"}
_SAMPLE_SECONDS = 0.02
_EVICT_SECONDS = 0.2


def merges(parameters: int, scratch: Path | None, rounds: int) -> Iterator[Row]:
    """Random Llama checkpoints merged by each contestant, by the built-in in one round only.

    `mergekit-yaml --help` shows what start-up takes.
    """
    with tempfile.TemporaryDirectory(prefix="karcher-benchmark-", dir=scratch) as name:
        folder = Path(name)
        _check_space(folder, parameters)
        models, total = write_checkpoints(folder, parameters, MODELS)
        # Or else the first merges would compete with the writing.
        os.sync()
        calls = {c: partial(_merge, c, folder, models) for c in _METHODS}
        calls[START_UP] = partial(watch, ["--help"], folder / "log", os.environ)
        counts = dict.fromkeys(calls, rounds) | {BUILTIN: 1}
        cached = interleave(calls, counts)
        some = {name: calls[name] for name in (OURS, WHOLE_MODEL, LINEAR)}
        with _evicted(folder):
            evicted = interleave(some, dict.fromkeys(some, (rounds + 1) // 2))
    case = {"parameters": f"{total / 1e9:.3g}e9", "models": MODELS, "dtype": "bf16"}
    yield from whole_rows(case | {"page cache": "kept"}, cached)
    yield from whole_rows(case | {"page cache": "evicted"}, evicted)


def reports(parameters: int, scratch: Path | None, rounds: int) -> Iterator[Row]:
    """The report against the merge that it is on, and that merge writing it as it goes.

    Around a base there is one more model to read.
    """
    with tempfile.TemporaryDirectory(prefix="karcher-benchmark-", dir=scratch) as name:
        folder = Path(name)
        _check_space(folder, parameters)
        models, total = write_checkpoints(folder, parameters, MODELS + 1)
        os.sync()
        for origin in ("zero", "base"):
            case = {"parameters": f"{total / 1e9:.3g}e9", "models": MODELS, "origin": origin}
            calls = {
                contestant: partial(_report, contestant, origin, folder, models)
                for contestant in (MERGE, REPORT, REPORTING)
            }
            yield from whole_rows(case, interleave(calls, dict.fromkeys(calls, rounds)), "reports")


def metrics(parameters: int, scratch: Path | None, rounds: int) -> Iterator[Row]:
    """Merges in float32 metrics, twice as large as the bf16 models that they are of."""
    with tempfile.TemporaryDirectory(prefix="karcher-benchmark-", dir=scratch) as name:
        folder = Path(name)
        _check_space(folder, 3 * parameters)
        models, total = write_checkpoints(folder, parameters, MODELS)
        for model in models:
            write_metric(model, _metric_of(model))
        os.sync()
        methods = {
            LINEAR: ("linear", {}),
            OURS: ("karcher", {}),
            FISHER: ("fisher", {}),
            IN_METRIC: ("karcher", {}),
            ROWS_IN_METRIC: ("karcher", {"granularity": "row"}),
        }
        calls = {c: partial(_in_metric, c, *how, folder, models) for c, how in methods.items()}
        case = {"parameters": f"{total / 1e9:.3g}e9", "models": MODELS, "metrics": "float32"}
        yield from whole_rows(case, interleave(calls, dict.fromkeys(calls, rounds)), "metrics")


def making(parameters: int, scratch: Path | None, rounds: int, count: int = 32) -> Iterator[Row]:
    """`mergekit-karcher fisher` on windows of a text, against a loop of backward passes."""
    length = 128
    with tempfile.TemporaryDirectory(prefix="karcher-benchmark-", dir=scratch) as name:
        folder = Path(name)
        (model,), total = write_checkpoints(folder, parameters, 1)
        write_tokenizer(model)
        text = folder / "text.txt"
        text.write_text("".join(chr(97 + i * i % 23) for i in range(length * count)))
        ours = ["fisher", model, "--data", text, "--length", length, "--examples", count]
        loop = [Path(__file__).with_name("plain_fisher.py"), model, text, length, count]
        calls = {
            PLAIN_LOOP: partial(made, "python", loop, folder),
            **{
                f"batch {size}": partial(
                    made, "mergekit-karcher", [*ours, "--batch-size", size, "--out"], folder
                )
                for size in (1, 4)
            },
        }
        case = {"parameters": f"{total / 1e9:.3g}e9", "examples": count, "tokens": length}
        yield from whole_rows(case, interleave(calls, dict.fromkeys(calls, rounds)), "making")


def made(command: str, arguments: Sequence[Any], folder: Path) -> dict[str, float]:
    """A command that writes a folder or a file, whose name comes last, `watch`ed."""
    out = folder / "out"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    words = [*map(str, arguments), str(out)]
    measured = watch(words, folder / "log", environment, command=command)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return measured


def _in_metric(
    contestant: str,
    method: str,
    parameters: dict[str, Any],
    folder: Path,
    models: Sequence[Path],
) -> dict[str, float]:
    out, log, config = folder / "out", folder / "log", folder / "config.yml"

    def own(model: Path) -> dict[str, Any]:
        metric = {} if contestant in (LINEAR, OURS) else {"metric": str(_metric_of(model))}
        return {"model": str(model), "parameters": {"weight": 1.0} | metric}

    document = {"merge_method": method, "models": list(map(own, models)), "dtype": "bfloat16"}
    config.write_text(yaml.safe_dump(document | {"parameters": parameters}))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    measured = watch([str(config), str(out), "--no-copy-tokenizer"], log, environment)
    shutil.rmtree(out)
    return measured


def _metric_of(model: Path) -> Path:
    return model.with_name(model.name.replace("model", "metric"))


def _report(contestant: str, origin: str, folder: Path, models: Sequence[Path]) -> dict[str, float]:
    out, log, config = folder / "out", folder / "log", folder / "config.yml"
    *inputs, base = map(str, models)
    document: dict[str, Any] = {
        "merge_method": "karcher",
        "models": [{"model": model} for model in inputs],
        "dtype": "bfloat16",
    }
    if origin == "base":
        document |= {"base_model": base, "parameters": {"origin": "base"}}
        document |= {"dtype": "float32", "out_dtype": "bfloat16"}
    config.write_text(yaml.safe_dump(document))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if contestant == REPORTING:
        environment["MERGEKIT_KARCHER_REPORT"] = str(folder / "geometry")
    if contestant == REPORT:
        arguments = ["report", str(config), "--out", str(folder / "geometry")]
        measured = watch(arguments, log, environment, command="mergekit-karcher")
    else:
        measured = watch([str(config), str(out), "--no-copy-tokenizer"], log, environment)
        shutil.rmtree(out)
    if contestant != MERGE:
        (folder / "geometry" / "report.json").unlink()
    return measured


def whole_rows(
    case: dict[str, Any], runs: dict[str, dict[int, dict[str, float]]], section: str = "merges"
) -> Iterator[Row]:
    """A row for each contestant: times, and quantiles of all else that `watch` measured."""
    seconds = {
        name: {turn: run["seconds"] for turn, run in turns.items()} for name, turns in runs.items()
    }
    more = {
        name: {key: quantiles([run[key] for run in turns.values()]) for key in turns[0]}
        for name, turns in runs.items()
    }
    yield from timed_rows(section, case, seconds, more)


@contextmanager
def _evicted(folder: Path) -> Iterator[None]:
    """Keep what merges have read out of the page cache, as if there was no memory for it.

    Pages that are mapped stay: those of the shard that is being read.
    """
    ended = threading.Event()

    def evict() -> None:
        while not ended.wait(_EVICT_SECONDS):
            for path in folder.glob("model-*/*.safetensors"):
                file = os.open(path, os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)

    thread = threading.Thread(target=evict)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _check_space(folder: Path, parameters: int) -> None:
    needed, free = 2 * parameters * (MODELS + 1) * 1.2, shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{folder} has {free / 1e9:.1f} GB free of the {needed / 1e9:.1f} GB needed: "
            "give another folder by --scratch, or fewer --params."
        )


def _merge(contestant: str, folder: Path, models: Sequence[Path]) -> dict[str, float]:
    out, log, config = folder / "out", folder / "log", folder / "config.yml"
    weight = {"parameters": {"weight": 1.0}} if contestant == LINEAR else {}
    document = {
        "merge_method": _METHODS[contestant],
        "models": [{"model": str(model)} | weight for model in models],
        "dtype": "bfloat16",
    }
    if contestant == WHOLE_MODEL:
        document["parameters"] = {"granularity": "model"}
    config.write_text(yaml.safe_dump(document))
    environment = {"HF_HUB_OFFLINE": "1", "MERGEKIT_KARCHER": "0" if contestant == BUILTIN else "1"}
    arguments = [str(config), str(out), "--no-copy-tokenizer"]
    measured = watch(arguments, log, os.environ | environment)
    if ("tensors merged" in log.read_text()) != (contestant in (OURS, WHOLE_MODEL)):
        raise RuntimeError(f"the wrong method ran for {contestant}:\n{log.read_text()[-2000:]}")
    shutil.rmtree(out)
    return measured


def watch(
    arguments: Sequence[str], log: Path, environment: Any, command: str = "mergekit-yaml"
) -> dict[str, float]:
    """Run a command and sample its memory.

    The kernel's own account for a finished child (ru_maxrss) starts at the peak of its parent.
    """
    peaks = {"VmHWM": 0, "RssAnon": 0}
    with log.open("wb") as file:
        start = time.perf_counter()
        process = subprocess.Popen(
            [SCRIPTS / command, *arguments], stdout=file, stderr=file, env=environment
        )
        status_file, ended = Path(f"/proc/{process.pid}/status"), 0
        while not ended:
            found = dict(re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", status_file.read_text()))
            peaks = {key: max(peak, int(found.get(key, 0))) for key, peak in peaks.items()}
            time.sleep(_SAMPLE_SECONDS)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{command} failed:\n{log.read_text()[-4000:]}")
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_mb": peaks["VmHWM"] * 1024 / 1e6,
        "peak_anonymous_mb": peaks["RssAnon"] * 1024 / 1e6,
        "load_average": os.getloadavg()[0],
    }
