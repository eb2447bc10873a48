"""What `mergekit-karcher compare` chooses on the demo's experts.

`python benchmarks/quality/choices.py`

Trains them as run.py does, or takes what that kept, compares them without and with tuning, and
writes choices.json and choices.md beside this script. All numbers are of the windows to report by.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path += [str(Path(__file__).resolve().parents[2] / name) for name in ("demo", "benchmarks")]
from rows import Row, row

# transformers would take benchmarks/kernels.py for the package of that name.
sys.path.pop()

import language
import torch
from texts import KINDS, load
from train import byte_tokenizer

from mergekit_karcher.compare.result import Comparison, read

_HERE = Path(__file__).resolve().parent
_COMMAND = Path(sysconfig.get_path("scripts"), "mergekit-karcher")
_LENGTH, _WINDOWS = 64, 16
_ALONE = ("linear", "fisher, self", "karcher, row, base, linear length")


def experts(seeds: int, cache: Path, folder: Path) -> Iterator[tuple[int, Path]]:
    """A seed, and a folder with its base and its experts in the format of Hugging Face."""
    sizes = language.Sizes()
    model, tokenizer = language.model_of(sizes), byte_tokenizer()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    for problem in language.problems(sizes, "demo", seeds, cache):
        seed = problem.case["seed"]
        states = {"base": problem.base} | {e.task: e.state for e in problem.experts}
        for name, state in states.items():
            language.load_state(model, state)
            model.save_pretrained(folder / str(seed) / name)
            tokenizer.save_pretrained(folder / str(seed) / name)
        yield seed, folder / str(seed)


def compared(models: Path, texts: Path, out: Path, options: Sequence[str]) -> Comparison:
    """What compare finds of them."""
    words: list[Any] = ["--base", models / "base", *(models / kind for kind in KINDS)]
    for kind in KINDS:
        words += ["--data", f"{kind}={texts / kind}.txt"]
    words += ["--length", _LENGTH, "--windows", _WINDOWS, "--out", out, "--quiet", *options]
    subprocess.run([str(word) for word in (_COMMAND, "compare", *words)], check=True)
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


def markdown(rows: Sequence[Row]) -> str:
    """A line a seed and way to compare."""
    lines = [
        "# What compare chooses",
        "",
        f"The demo's experts; windows of {_LENGTH} tokens, {_WINDOWS} of each text to choose by "
        "and as many others to report by. Bits per byte on the latter minus those of linear, ± the "
        "standard error over windows. The best merge is that on the windows to report by.",
        "",
        "| seed | options | chosen | best | task_arithmetic, its best | fisher, self | "
        "karcher, row, base, linear length |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in rows:
        result = one["result"]
        cells = [
            f"{result[place]['difference']:+.3f} ± {result[place]['error']:.3f}"
            for place in ("chosen", "best", "task_arithmetic", *_ALONE[1:])
        ]
        for place, cell in ((0, "chosen"), (1, "best"), (2, "task_arithmetic")):
            cells[place] = f"{result[cell]['name']}: {cells[place]}"
        options = one["case"]["options"] or "none"
        lines.append(f"| {one['case']['seed']} | {options} | {' | '.join(cells)} |")
    last = rows[-1]
    return "\n".join([*lines, "", f"{last['machine']}; {last['versions']}; {last['when']}.", ""])


def main() -> None:
    """Compare, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=_HERE / ".cache", help="trained weights")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="karcher-benchmark-") as name:
        folder = Path(name)
        for kind in KINDS:
            (folder / f"{kind}.txt").write_text(load(kind).held_out)
        for seed, models in experts(options.seeds, options.cache, folder):
            torch.manual_seed(seed)
            out = models / "compared"
            for more in ([], ["--tune", "--tune-kinds"]):
                case = {"set": "demo", "seed": seed, "options": " ".join(more)}
                # The second run takes what the first one has kept.
                result = found(compared(models, folder, out, more))
                rows.append(row("choices", case, "compare", result))
    path = _HERE / "choices.json"
    path.write_text("[\n" + ",\n".join(json.dumps(one) for one in rows) + "\n]\n")
    path.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
