"""What `mergekit-karcher compare` chooses: `python benchmarks/quality/choices.py`.

Trains experts as run.py does, or takes what that kept, compares them without and with tuning, and
writes choices.json and choices.md beside this script. All numbers are of the windows to report by.
As a rival that has seen the answers, task_arithmetic has its lambda picked on these windows. Sets
that were not asked for keep the rows that the file has of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path += [str(Path(__file__).resolve().parents[2] / name) for name in ("demo", "benchmarks")]
from rows import Row, row

# transformers would take benchmarks/kernels.py for the package of that name.
sys.path.pop()

import brown
import language
import lora
import smollm
import torch
from problem import Problem, State
from texts import KINDS, load
from train import byte_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mergekit_karcher.compare.candidates import LINEAR, default_candidates
from mergekit_karcher.compare.result import Comparison, Entry, read

_HERE = Path(__file__).resolve().parent
_COMMAND = Path(sysconfig.get_path("scripts"), "mergekit-karcher")
_ALONE = (LINEAR, "fisher, self", "karcher, row, base, linear length")
_OPTIONS = {"plain": (), "tuned": ("--tune", "--tune-kinds")}
_LAMBDAS = "lambdas"
_RIVAL = "task_arithmetic"
_TENTHS = range(1, 13)  # of its lambda


class Set(NamedTuple):
    """Experts, and how they are compared.

    problems: for a number of seeds and a cache folder. network: for the cache folder, one that
    takes the weights of any of them, and its tokenizer. load: gives it weights. length, windows:
    of `compare`. dtype: of the files. texts: for the cache folder, a held-out one for each expert.
    """

    problems: Callable[[int, Path], Iterator[Problem]]
    network: Callable[[Path], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    load: Callable[[Any, State], None]
    length: int
    windows: int
    dtype: torch.dtype
    texts: Callable[[Path], dict[str, str]]


def _held_out(_cache: Path) -> dict[str, str]:
    return {kind: load(kind).held_out for kind in KINDS}


def _of_genres(count: int, cache: Path) -> dict[str, str]:
    documents = brown.documents(cache, count)
    return {genre: "\n\n".join(texts[-brown.HELD_OUT :]) for genre, texts in documents.items()}


def _smollm(
    problems: Callable[[int, Path], Iterator[Problem]],
    texts: Callable[[Path], dict[str, str]] = _held_out,
) -> Set:
    return Set(
        problems,
        smollm.pretrained,
        smollm.load_state,
        length=128,
        windows=8,
        dtype=torch.bfloat16,
        texts=texts,
    )


def _tiny(name: str, sizes: language.Sizes) -> Set:
    def network(_cache: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = language.model_of(sizes), byte_tokenizer()
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, token, getattr(tokenizer, token))
        return model, tokenizer

    return Set(
        partial(language.problems, sizes, name),
        network,
        language.load_state,
        length=64,
        windows=16,
        dtype=torch.float32,
        texts=_held_out,
    )


def _genres(count: int) -> Set:
    problems = partial(brown.problems, brown.TRAINING, (count,), "SmolLM2-135M, genres")
    return _smollm(problems, partial(_of_genres, count))


SETS = {
    "demo": _tiny("demo", language.Sizes()),
    "demo, larger": _tiny("demo, larger", language.LARGER),
    "demo, long": _tiny("demo, long", language.LONG),
    "SmolLM2-135M": _smollm(partial(smollm.problems, smollm.Sizes(), "SmolLM2-135M")),
    "SmolLM2-135M, LoRA": _smollm(
        partial(smollm.problems, lora.SIZES, "SmolLM2-135M, LoRA", fine_tune=lora.fine_tune)
    ),
    **{f"SmolLM2-135M, {count} genres": _genres(count) for count in brown.COUNTS},
}


def experts(chosen: Set, seeds: int, cache: Path, folder: Path) -> Iterator[tuple[int, Path]]:
    """A seed, and a folder with its base and its experts in the format of Hugging Face."""
    for problem in chosen.problems(seeds, cache):
        seed = problem.case["seed"]
        model, tokenizer = chosen.network(cache)
        states = {"base": problem.base} | {e.task: e.state for e in problem.experts}
        for name, state in states.items():
            chosen.load(model, state)
            model.to(chosen.dtype).save_pretrained(folder / str(seed) / name)
            model.float()
            tokenizer.save_pretrained(folder / str(seed) / name)
        yield seed, folder / str(seed)


def compared(
    chosen: Set, what: Sequence[str | Path], texts: Path, out: Path, options: Sequence[str]
) -> Comparison:
    """What compare finds of models or configs, by the texts of a folder."""
    words: list[Any] = [_COMMAND, "compare", *what, "--out", out, "--quiet", *options]
    words += ["--length", chosen.length, "--windows", chosen.windows]
    for text in sorted(texts.glob("*.txt")):
        words += ["--data", f"{text.stem}={text}"]
    subprocess.run([str(word) for word in words], check=True)
    return read(out)


def summary(comparison: Comparison) -> dict[str, Any]:
    """The chosen merge and others beside it, as differences to linear."""
    merges = sorted(comparison.merges, key=lambda merge: merge.reporting.mean)
    scaled = [merge for merge in merges if merge.name.startswith(_RIVAL)]
    places = {"chosen": comparison.entry(comparison.chosen), "best": merges[0]}
    places |= {"task_arithmetic": scaled[0]}
    places |= {name: comparison.entry(name) for name in _ALONE}
    return {place: as_cell(merge) for place, merge in places.items()}


def as_cell(merge: Entry) -> dict[str, Any]:
    """What a row says of a merge."""
    return {
        "name": merge.name,
        "mean": round(merge.reporting.mean, 5),
        "difference": round(merge.reporting.difference or 0.0, 5),
        "error": round(merge.reporting.error or 0.0, 5),
        "tuned": {one.name: round(one.value, 4) for one in merge.tuned},
    }


def with_lambdas(base: Path, models: Sequence[Path], dtype: str, folder: Path) -> list[Path]:
    """Configs of linear, and of task_arithmetic with each lambda, as compare makes them."""
    candidates = default_candidates(str(base), [str(model) for model in models], dtype, {})
    plain = {one.name: one for one in candidates}
    configs = {LINEAR: plain[LINEAR]}
    for value in (tenths / 10 for tenths in _TENTHS):
        config = {**plain[_RIVAL].config, "parameters": {"lambda": value}}
        configs[f"lambda {value}"] = replace(plain[_RIVAL], config=config)
    folder.mkdir()
    for name, candidate in configs.items():
        (folder / f"{name}.yml").write_text(candidate.source)
    return [folder / f"{name}.yml" for name in configs]


def measure(name: str, runs: Sequence[str], seeds: int, cache: Path) -> Iterator[Row]:
    """A row for each seed of a set and each way to compare its experts."""
    chosen = SETS[name]
    with tempfile.TemporaryDirectory(prefix="karcher-benchmark-") as scratch:
        texts = Path(scratch)
        for text, written in chosen.texts(cache).items():
            (texts / f"{text}.txt").write_text(written)
        for seed, folder in experts(chosen, seeds, cache, texts):
            base = folder / "base"
            models = sorted(folder / path.stem for path in texts.glob("*.txt"))
            for options in (options for run, options in _OPTIONS.items() if run in runs):
                what = ["--base", base, *models]
                case = {"set": name, "seed": seed, "options": " ".join(options)}
                # Each run takes what the one before has kept.
                comparison = compared(chosen, what, texts, folder / "compared", options)
                yield row("choices", case, "compare", summary(comparison))
            if _LAMBDAS in runs:
                dtype = str(chosen.dtype).removeprefix("torch.")
                configs = with_lambdas(base, models, dtype, folder / "configs")
                merges = compared(chosen, configs, texts, folder / "lambdas", ()).merges
                scaled = [merge for merge in merges if merge.name != LINEAR]
                best = min(scaled, key=lambda merge: merge.reporting.mean)
                yield row("choices", {"set": name, "seed": seed}, _RIVAL, {"best": as_cell(best)})


def markdown(rows: Sequence[Row]) -> str:
    """A line a seed and way to compare, and one a seed of the rival."""
    names = {one["case"]["set"] for one in rows}
    measured = {name: one for name, one in SETS.items() if name in names}
    lines = [
        "# What compare chooses",
        "",
        "The sets of results.md. Of each held-out text some windows to choose by and as many "
        "others to report by. Bits per byte on the latter minus those of linear, ± the standard "
        "error over windows. The best merge is that on the windows to report by.",
        "",
        *(
            f"- {name}: {one.windows} windows of {one.length} tokens"
            for name, one in measured.items()
        ),
        "",
        "| set | seed | options | chosen | best | task_arithmetic, its best | fisher, self | "
        "karcher, row, base, linear length |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in (one for one in rows if one["contestant"] != _RIVAL):
        result = one["result"]
        cells = [
            with_error(result[place])
            for place in ("chosen", "best", "task_arithmetic", *_ALONE[1:])
        ]
        for place, cell in ((0, "chosen"), (1, "best"), (2, "task_arithmetic")):
            cells[place] = f"{result[cell]['name']}: {cells[place]}"
        case = one["case"]
        options = case["options"] or "none"
        lines.append(f"| {case['set']} | {case['seed']} | {options} | {' | '.join(cells)} |")
    lines += [
        "",
        "Plain `task_arithmetic` with that lambda of "
        f"{', '.join(str(tenths / 10) for tenths in _TENTHS)} which is best on the very windows to "
        "report by:",
        "",
        "| set | seed | lambda | difference |",
        "| --- | --- | --- | --- |",
    ]
    for one in (one for one in rows if one["contestant"] == _RIVAL):
        best, case = one["result"]["best"], one["case"]
        value = best["name"].removeprefix("lambda ")
        lines.append(f"| {case['set']} | {case['seed']} | {value} | {with_error(best)} |")
    last = max(rows, key=lambda one: one["when"])
    circumstances = ", ".join(f"{k} {v}" for k, v in (last["machine"] | last["versions"]).items())
    return "\n".join([*lines, "", f"{circumstances}; to {last['when']}.", ""])


def key(row: Row) -> tuple[int, int, str, str]:
    """What a row is of, and its place in the file."""
    case = row["case"]
    place = list(SETS).index(case["set"])
    return place, case["seed"], row["contestant"], case.get("options", "")


def with_error(cell: dict[str, Any]) -> str:
    """The difference to linear, with its standard error."""
    return f"{cell['difference']:+.3f} ± {cell['error']:.3f}"


def main() -> None:
    """Compare, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=SETS, nargs="+", metavar="SET")
    parser.add_argument(
        "--runs",
        choices=[*_OPTIONS, _LAMBDAS],
        nargs="+",
        default=[*_OPTIONS, _LAMBDAS],
        help="compare without tuning, with it, or task_arithmetic alone with many lambdas",
    )
    parser.add_argument("--cache", type=Path, default=_HERE / ".cache", help="trained weights")
    parser.add_argument("--out", type=Path, default=_HERE / "choices.json")
    options = parser.parse_args()
    rows: list[Row] = json.loads(options.out.read_text()) if options.out.is_file() else []
    for name in options.only or SETS:
        for fresh in measure(name, options.runs, options.seeds, options.cache):
            # One line a case: a new run of it takes the place of the old one.
            rows = [r for r in rows if key(r) != key(fresh)] + [fresh]
            rows.sort(key=key)
            options.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
            options.out.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
