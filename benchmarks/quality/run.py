"""Measure the quality of merged models: `python benchmarks/quality/run.py`.

Rows go to results.json, tables to results.md and charts to quality.png, all beside this script.
Sets and contestants that were not run keep the rows that the file has of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Set before torch is imported, so that the rows, too, record one thread; sums of several threads
# would differ from machine to machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path += [str(Path(__file__).resolve().parents[2] / name) for name in ("demo", "benchmarks")]
from rows import Row, row

# transformers would take benchmarks/kernels.py for the package of that name.
sys.path.pop()

import brown
import classify
import from_data
import language
import lora
import reactions
import smollm
from contestants import BASE, OWN, WITH_BASE, WITHOUT_BASE
from geometry import effective_lambda, geometry
from plot import plot
from problem import Metrics, Problem, mean
from tables import GEOMETRY, markdown

SEEDS = 3
_HERE = Path(__file__).resolve().parent
Make = Callable[[int, Path], Iterator[Problem]]


def sets(quick: bool) -> dict[str, Make]:
    """The problems of each set, by name, for a number of seeds and a cache folder."""
    llama, larger, long = language.Sizes(), language.LARGER, language.LONG
    if quick:
        llama, larger, long = (
            replace(sizes, base_steps=4, expert_steps=sizes.expert_steps // 40)
            for sizes in (llama, larger, long)
        )
    eight, eight_long, single = classify.SHORT, classify.LONG, classify.SINGLE
    if quick:
        few = replace(eight.base, steps=9)
        eight = replace(eight, widths=(16,), counts=(2, 8), base=few, expert=few)
        eight_long = replace(eight, expert=replace(few, steps=18))
        single = replace(single, steps=9)
    smol = smollm.Sizes(expert_steps=2, windows=1) if quick else smollm.Sizes()
    low_rank = replace(lora.SIZES, expert_steps=2, windows=1) if quick else lora.SIZES
    genres = (2,) if quick else brown.COUNTS
    brown_steps = replace(brown.TRAINING, expert_steps=2 if quick else brown.TRAINING.expert_steps)
    members, width = (3, 16) if quick else (10, 256)
    makes: dict[str, Callable[[str, int, Path], Iterator[Problem]]] = {
        "demo": partial(language.problems, llama),
        "demo, larger": partial(language.problems, larger),
        "demo, long": partial(language.problems, long),
        "SmolLM2-135M": partial(smollm.problems, smol),
        "SmolLM2-135M, LoRA": partial(smollm.problems, low_rank, fine_tune=lora.fine_tune),
        "SmolLM2-135M, genres": partial(brown.problems, brown_steps, genres),
        "eight tasks": partial(classify.eight_tasks, eight),
        "eight tasks, long": partial(classify.eight_tasks, eight_long),
        "reactions": reactions.problems,
        "different initialisations": partial(classify.independent, members, width, single),
    }
    return {name: partial(make, name) for name, make in makes.items()}


def measure(problem: Problem, wanted: Sequence[str] | None) -> Iterator[Row]:
    """A row for the geometry, the base, the experts and every contestant, or the wanted ones."""

    def found(contestant: str, tasks: dict[str, Metrics], extra: dict[str, float]) -> Row:
        result = {"tasks": tasks, "mean": mean(list(tasks.values()))} | extra
        return row(problem.section, problem.case, contestant, result)

    states = [expert.state for expert in problem.experts]
    if wanted is None or GEOMETRY in wanted:
        yield row(problem.section, problem.case, GEOMETRY, geometry(problem))
    if problem.base is not None and (wanted is None or BASE in wanted):
        yield found(BASE, problem.evaluate(problem.base), {})
    if wanted is None or OWN in wanted:
        yield found(OWN, problem.evaluate_experts(), {})
    for name, merge in (WITHOUT_BASE if problem.base is None else WITH_BASE).items():
        if wanted is None or name in wanted:
            merged = merge(problem.base, states)
            yield found(name, problem.evaluate(merged), effective_lambda(problem, merged))
    for name, merged in from_data.merges(problem, wanted):
        yield found(name, problem.evaluate(merged), effective_lambda(problem, merged))


def write(rows: Sequence[Row], path: Path) -> None:
    """The JSON file, one line a row, and the tables and the charts beside it."""
    lines = [json.dumps(_rounded(row), separators=(",", ":")) for row in rows]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    path.with_suffix(".md").write_text(markdown(rows))
    plot(rows, path.with_name("quality.png"))


def _rounded(value: Any) -> Any:
    """Numbers to six digits, more than any seed repeats: the file is half as large."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    """Run the sets that were asked for, and write after each problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", choices=sets(quick=False), nargs="+", metavar="SET")
    parser.add_argument(
        "--cache", type=Path, default=_HERE / ".cache", help="trained weights, data"
    )
    parser.add_argument(
        "--contestants",
        choices=[GEOMETRY, BASE, OWN, *WITH_BASE, *WITHOUT_BASE, *from_data.FROM_DATA],
        nargs="+",
        metavar="CONTESTANT",
    )
    parser.add_argument("--out", type=Path, help="JSON file; default: beside this script")
    options = parser.parse_args()
    # A quick run must not take the place of a true one.
    path = options.out or (None if options.quick else _HERE / "results.json")
    rows: list[Row] = json.loads(path.read_text()) if path and path.is_file() else []
    makes = sets(options.quick)
    for name in options.only or makes:
        fresh: list[Row] = []
        again = options.contestants or {r["contestant"] for r in rows}
        kept = [r for r in rows if r["section"] != name or r["contestant"] not in again]
        for problem in makes[name](1 if options.quick else options.seeds, options.cache):
            print(name, dict(problem.case), file=sys.stderr)
            for found in measure(problem, options.contestants):
                found["versions"] |= {"transformers": version("transformers")}
                fresh.append(found)
            rows = sorted([*kept, *fresh], key=lambda r: list(makes).index(r["section"]))
            if path:
                write(rows, path)
    print(markdown(rows))


if __name__ == "__main__":
    main()
