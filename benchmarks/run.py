"""Measure this package against mergekit's own karcher and linear: `python benchmarks/run.py`.

Rows go to a JSON file, tables to the screen and to a markdown file beside it. Sections that were
not run keep the rows that the file has of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# The profiler of torch announces every start and stop otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from error import error
from geometries import geometries
from kernels import QUICK, Sizes, kernels
from long_runs import long_runs
from matrices import inputs, own_changes, solves
from merges import making, merges, metrics, reports
from passes import passes
from rows import Row
from runner import runner
from scratch import scratch
from table import markdown

RESULTS = Path(__file__).with_name("results.json")
SECTIONS = (
    "kernels",
    "passes",
    "geometries",
    "long",
    "scratch",
    "error",
    "merges",
    "runner",
    "reports",
    "metrics",
    "making",
    "own changes",
    "inputs",
    "solves",
)


def measure(section: str, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one section."""
    quick = options.quick
    if section == "kernels":
        return kernels(QUICK if quick else Sizes())
    if section == "passes":
        return passes(256, 2) if quick else passes(4096, 7)
    if section == "geometries":
        return geometries(256, (2,), 2) if quick else geometries(4096, (2, 5, 17), 7)
    if section == "long":
        return long_runs(256, 64, 3, 3) if quick else long_runs(4096, 512, 17, 3)
    if section == "scratch":
        return scratch(512 if quick else 4096)
    if section == "error":
        return error((2,), (1e-8, 0.7)) if quick else error()
    if section in ("own changes", "inputs"):
        of_models = own_changes if section == "own changes" else inputs
        return of_models(2 if quick else 30, options.scratch, 1 if quick else 5)
    if section == "solves":
        wide = ((1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336))
        return solves(((64, 64),) if quick else wide, 3, options.device)
    if section == "making":
        size, rounds = (4_000_000, 1) if quick else (100_000_000, 3)
        return making(options.params or size, options.scratch, rounds)
    parameters = options.params or (20_000_000 if quick else 1_000_000_000)
    whole = {"reports": reports, "metrics": metrics, "merges": merges, "runner": runner}[section]
    # Metrics are two more models' worth of files for each.
    parameters = parameters // 3 if section == "metrics" else parameters
    rounds = 1 if quick else 3 if section == "runner" else 5
    return whole(parameters, options.scratch, rounds=rounds)


def write(rows: Sequence[Row], path: Path) -> None:
    """The JSON file, one line a row, and the markdown file beside it."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    path.with_suffix(".md").write_text(markdown(rows))


def main() -> None:
    """Run what was asked for, and write after each section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS)
    parser.add_argument("--out", type=Path, help="JSON file; default: beside this script")
    parser.add_argument("--params", type=int, help="parameters of each whole model")
    parser.add_argument("--scratch", type=Path, help="where whole models may lie for a while")
    parser.add_argument("--device", default="cpu", help="where solves run: cpu or cuda")
    options = parser.parse_args()
    # A quick run must not take the place of a true one.
    path = options.out or (None if options.quick else RESULTS)
    rows: list[Row] = json.loads(path.read_text()) if path and path.is_file() else []
    for section in options.only:
        found = []
        for row in measure(section, options):
            print(section, row["case"], row["contestant"], file=sys.stderr)
            found.append(row)
        rows = [row for row in rows if row["section"] != section] + found
        if path:
            write(rows, path)
    print(markdown(rows))


if __name__ == "__main__":
    main()
