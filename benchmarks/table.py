"""Rows as markdown tables: a line for each case, columns for what its contestants measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from contestants import BUILTIN, CONTESTANTS, LINEAR, OURS
from geometries import BASE, ROW, ROW_BASE, TENSOR
from matrices import FORWARD, SELF
from merges import MERGE, PLAIN_LOOP
from passes import COMBINE, CONVERSION, DOUBLE_GRAM, GRAM, SUM
from rows import Row
from runner import COPY, YAML

_TIMES = "Minimum / median / 90 % of the rounds; quotients are of times in one round."

# Of whole processes.
_MEMORY = (
    ("peak RSS, MB", "", "peak_rss_mb"),
    ("peak anonymous, MB", "", "peak_anonymous_mb"),
    ("load average", "", "load_average"),
)

# For each section a heading, an explanation, and columns as (title, contestant, *keys of its
# result). Where no contestant is named, each has a line of its own.
_SECTIONS: dict[str, tuple[str, str, Sequence[tuple[str, ...]]]] = {
    "kernels": (
        "One process, defaults",
        _TIMES,
        (
            *((f"{name}, s", name, "seconds") for name in CONTESTANTS),
            ("built-in / ours", BUILTIN, "over", OURS),
            ("ours / linear", OURS, "over", LINEAR),
            ("built-in to ours, rad", BUILTIN, "rad_from_ours"),
        ),
    ),
    "passes": (
        "The two passes, in one thread",
        f"{_TIMES} Processor time of one 4096 x 4096 tensor of each model. Pages are new where "
        "freed memory goes back to the system, as large blocks do by default, and kept where "
        "the allocator is told to keep it. Ours as a merge takes them, with products of 16-bit "
        "inputs in float32.",
        (
            *(
                (f"{name}, s", name, "seconds")
                for name in (SUM, GRAM, DOUBLE_GRAM, COMBINE, LINEAR, OURS)
            ),
            (f"{GRAM} / {DOUBLE_GRAM}", GRAM, "over", DOUBLE_GRAM),
            (f"{SUM} / {GRAM}", SUM, "over", GRAM),
            (f"{SUM} / {CONVERSION}", SUM, "over", CONVERSION),
            ("ours / linear", OURS, "over", LINEAR),
        ),
    ),
    "geometries": (
        "One process, granularities and origins",
        _TIMES,
        (
            *((f"{name}, s", name, "seconds") for name in (TENSOR, ROW, BASE, ROW_BASE)),
            *((f"{name} / {TENSOR}", name, "over", TENSOR) for name in (ROW, BASE, ROW_BASE)),
        ),
    ),
    "long": (
        "One process, bf16, as published configurations ask for",
        f"{_TIMES} EXTRAPOLATED: from the seconds per iteration, which are the difference of a run "
        "of 5 and one of 15.",
        (
            ("ours, s", OURS, "seconds"),
            ("built-in, s", BUILTIN, "seconds"),
            ("built-in / ours", BUILTIN, "over", OURS),
            ("built-in, s per iteration", BUILTIN, "seconds_per_iteration"),
            ("built-in, iterations", BUILTIN, "iterations"),
        ),
    ),
    "scratch": (
        "Peak scratch memory",
        "In outputs, the result among them, and in MB beyond the result; inputs not counted. "
        "With several threads only the calling one is seen, which allocates our buffers.",
        (
            *((f"{name}, outputs", name, "outputs") for name in CONTESTANTS),
            *((f"{name}, MB over", name, "mb_over_one_output") for name in CONTESTANTS),
        ),
    ),
    "error": (
        "Error against 50 digits",
        "64 elements, all inputs at the radius from their mean (before they were rounded to the "
        "dtype). Ulp of sum |k_i W_i|, the worst element; radians between result and mean. "
        "Patient: max_iter 999, tol 1e-10.",
        tuple(
            (f"{name}, {key}", name, key)
            for key in ("ulp", "rad")
            for name in (OURS, BUILTIN, f"{OURS}, patient", f"{BUILTIN}, patient", "exact, rounded")
        ),
    ),
    "merges": (
        "Whole mergekit-yaml processes",
        f"{_TIMES} Peak RSS counts mapped model files, anonymous memory does not. "
        "Start-up is `mergekit-yaml --help`.",
        (
            ("s", "", "seconds"),
            ("/ linear", "", "over", LINEAR),
            ("/ ours", "", "over", OURS),
            ("processor s", "", "processor_seconds"),
            *_MEMORY,
        ),
    ),
    "runner": (
        "mergekit-karcher merge against mergekit-yaml",
        f"{_TIMES} Whole processes, inputs in the page cache, output to a memory file system and "
        "to disk; start-up is --help. `cat and cp` reads all inputs once and writes the size of "
        "the output once. Anonymous memory is that of the largest process, imports included.",
        (
            ("s", "", "seconds"),
            ("/ mergekit-yaml linear", "", "over", f"{YAML} linear"),
            ("/ mergekit-yaml karcher", "", "over", f"{YAML} karcher"),
            ("/ cat and cp", "", "over", COPY),
            ("processor s", "", "processor_seconds"),
            ("anonymous, MB", "", "largest_process_anonymous_mb"),
            ("load average", "", "load_average"),
        ),
    ),
    "reports": (
        "The report and the merge that it is on",
        f"{_TIMES} Whole processes, bf16 checkpoints, with the plots drawn. Around a base there is "
        "one model more to read, and the arithmetic is that of float32 inputs.",
        (
            ("s", "", "seconds"),
            ("/ merge", "", "over", MERGE),
            *_MEMORY,
        ),
    ),
    "making": (
        "Making a metric",
        f"{_TIMES} Whole processes: the diagonal Fisher information of a Llama-type model with "
        "random weights in float32, by `mergekit-karcher fisher` and by a loop of backward passes.",
        (
            ("s", "", "seconds"),
            ("/ loop", "", "over", PLAIN_LOOP),
            *_MEMORY,
        ),
    ),
    "own changes": (
        "Merges in the metrics of their own changes",
        f"{_TIMES} Whole mergekit-yaml processes, and mergekit-karcher report on the same config. "
        "Random models of the shape of SmolLM2-135M.",
        (
            ("s", "", "seconds"),
            ("/ linear", "", "over", LINEAR),
            ("processor s", "", "processor_seconds"),
            *_MEMORY,
        ),
    ),
    "inputs": (
        "Making metrics from activations",
        f"{_TIMES} Whole processes, the same model in float32.",
        (
            ("s", "", "seconds"),
            ("/ forward passes", "", "over", FORWARD),
            ("processor s", "", "processor_seconds"),
            *_MEMORY,
        ),
    ),
    "solves": (
        "One layer in the metrics of its own changes",
        f"{_TIMES} In one process.",
        (
            (f"{SELF}, s", SELF, "seconds"),
            (f"{LINEAR}, s", LINEAR, "seconds"),
            (f"{SELF} / {LINEAR}", SELF, "over", LINEAR),
        ),
    ),
    "metrics": (
        "Merges in metrics",
        f"{_TIMES} Whole mergekit-yaml processes, bf16 checkpoints; a float32 metric is twice as "
        "large a file as its model.",
        (
            ("s", "", "seconds"),
            ("/ linear", "", "over", LINEAR),
            ("processor s", "", "processor_seconds"),
            *_MEMORY,
        ),
    ),
}


def markdown(rows: Iterable[Row]) -> str:
    """All sections that have rows."""
    found = list(rows)
    parts = [_section(name, [r for r in found if r["section"] == name]) for name in _SECTIONS]
    return "\n".join(["# Benchmarks\n", *filter(None, parts)])


def _section(name: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    heading, explanation, columns = _SECTIONS[name]
    cases: dict[str, dict[str, Any]] = {}
    for row in rows:
        pivoted = columns[0][1] != ""
        case = row["case"] if pivoted else row["case"] | {"contestant": row["contestant"]}
        found = cases.setdefault(json.dumps(case), {})
        found[row["contestant"] if pivoted else ""] = row["result"]
    header = [*json.loads(next(iter(cases))), *(title for title, *_ in columns)]
    lines = [
        [*map(_cell, json.loads(case).values()), *(_cell(_look_up(found, *c[1:])) for c in columns)]
        for case, found in cases.items()
    ]
    body = "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])
    return f"## {heading}\n\n{explanation}\n\n{body}\n\n{_circumstances(rows)}\n"


def _look_up(found: Any, *keys: str) -> Any:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " / ".join(_cell(value[key]) for key in ("min", "median", "p90"))
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def _circumstances(rows: Sequence[Row]) -> str:
    places = {json.dumps(row["machine"] | row["versions"]) for row in rows}
    lines = [
        ", ".join(f"{key} {value}" for key, value in json.loads(place).items())
        for place in sorted(places)
    ]
    loads = [row["load_average"][0] for row in rows]
    when = f"{rows[0]['when']} to {rows[-1]['when']}"
    return "; ".join([*lines, f"load average {min(loads)} to {max(loads)}", when]) + "."
