"""What `mergekit-karcher compare` chooses: `python benchmarks/quality/choices.py`.

Trains experts as run.py does, or takes what that kept, compares them without and with tuning, and
writes choices.json and choices.md beside this script. All numbers are of the windows to report by.
Sets that were not asked for keep the rows that the file has of them.
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

from mergekit_karcher.compare.result import Comparison, read

_HERE = Path(__file__).resolve().parent
_COMMAND = Path(sysconfig.get_path("scripts"), "mergekit-karcher")
_ALONE = ("linear", "fisher, self", "karcher, row, base, linear length")
_TUNED = ("--tune", "--tune-kinds")
_GENRES = 5


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


def _genres(cache: Path) -> dict[str, str]:
    documents = brown.documents(cache, _GENRES)
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


SETS = {
    "demo": _tiny("demo", language.Sizes()),
    "demo, larger": _tiny("demo, larger", language.LARGER),
    "demo, long": _tiny("demo, long", language.LONG),
    "SmolLM2-135M": _smollm(partial(smollm.problems, smollm.Sizes(), "SmolLM2-135M")),
    "SmolLM2-135M, LoRA": _smollm(
        partial(smollm.problems, lora.SIZES, "SmolLM2-135M, LoRA", fine_tune=lora.fine_tune)
    ),
    "SmolLM2-135M, genres": _smollm(
        partial(brown.problems, brown.TRAINING, (_GENRES,), "SmolLM2-135M, genres"), _genres
    ),
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
    chosen: Set, models: Path, texts: Path, out: Path, options: Sequence[str]
) -> Comparison:
    """What compare finds of them."""
    names = sorted(path.stem for path in texts.glob("*.txt"))
    words: list[Any] = ["--base", models / "base", *(models / name for name in names)]
    for name in names:
        words += ["--data", f"{name}={texts / name}.txt"]
    words += ["--length", chosen.length, "--windows", chosen.windows, "--out", out, "--quiet"]
    subprocess.run([str(word) for word in (_COMMAND, "compare", *words, *options)], check=True)
    return read(out)


def found(comparison: Comparison) -> dict[str, Any]:
    """The chosen merge and others beside it, as differences to linear."""
    merges = sorted(comparison.merges, key=lambda merge: merge.reporting.mean)
    scaled = [merge for merge in merges if merge.name.startswith("task_arithmetic")]
    shown = {"chosen": comparison.entry(comparison.chosen), "best": merges[0]}
    shown |= {"task_arithmetic": scaled[0]}
    shown |= {name: comparison.entry(name) for name in _ALONE}
    return {
        place: {
            "name": merge.name,
            "mean": round(merge.reporting.mean, 5),
            "difference": round(merge.reporting.difference or 0.0, 5),
            "error": round(merge.reporting.error or 0.0, 5),
            "tuned": {one.name: round(one.value, 4) for one in merge.tuned},
        }
        for place, merge in shown.items()
    }


def measure(name: str, runs: Sequence[Sequence[str]], seeds: int, cache: Path) -> Iterator[Row]:
    """A row for each seed of a set and each way to compare its experts."""
    with tempfile.TemporaryDirectory(prefix="karcher-benchmark-") as scratch:
        folder = Path(scratch)
        for text, written in SETS[name].texts(cache).items():
            (folder / f"{text}.txt").write_text(written)
        for seed, models in experts(SETS[name], seeds, cache, folder):
            for options in runs:
                case = {"set": name, "seed": seed, "options": " ".join(options)}
                # Each run takes what the one before has kept.
                result = found(compared(SETS[name], models, folder, models / "compared", options))
                yield row("choices", case, "compare", result)


def markdown(rows: Sequence[Row]) -> str:
    """A line a seed and way to compare."""
    lines = [
        "# What compare chooses",
        "",
        "The sets of results.md. Of each held-out text some windows to choose by and as many "
        "others to report by. Bits per byte on the latter minus those of linear, ± the standard "
        "error over windows. The best merge is that on the windows to report by.",
        "",
        *(f"- {name}: {one.windows} windows of {one.length} tokens" for name, one in SETS.items()),
        "",
        "| set | seed | options | chosen | best | task_arithmetic, its best | fisher, self | "
        "karcher, row, base, linear length |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in rows:
        result = one["result"]
        cells = [
            f"{result[place]['difference']:+.3f} ± {result[place]['error']:.3f}"
            for place in ("chosen", "best", "task_arithmetic", *_ALONE[1:])
        ]
        for place, cell in ((0, "chosen"), (1, "best"), (2, "task_arithmetic")):
            cells[place] = f"{result[cell]['name']}: {cells[place]}"
        case = one["case"]
        options = case["options"] or "none"
        lines.append(f"| {case['set']} | {case['seed']} | {options} | {' | '.join(cells)} |")
    last = rows[-1]
    circumstances = ", ".join(f"{k} {v}" for k, v in (last["machine"] | last["versions"]).items())
    return "\n".join([*lines, "", f"{circumstances}; to {last['when']}.", ""])


def main() -> None:
    """Compare, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=SETS, nargs="+", metavar="SET")
    parser.add_argument("--no-tune", action="store_true", help="compare without tuning only")
    parser.add_argument("--cache", type=Path, default=_HERE / ".cache", help="trained weights")
    parser.add_argument("--out", type=Path, default=_HERE / "choices.json")
    options = parser.parse_args()
    rows: list[Row] = json.loads(options.out.read_text()) if options.out.is_file() else []
    runs = ((),) if options.no_tune else ((), _TUNED)
    for name in options.only or SETS:
        for fresh in measure(name, runs, options.seeds, options.cache):
            # One line a case: a new run of it takes the place of the old one.
            rows = [r for r in rows if r["case"] != fresh["case"]] + [fresh]
            rows.sort(key=lambda r: (list(SETS).index(r["case"]["set"]), r["case"]["seed"]))
            options.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
            options.out.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
