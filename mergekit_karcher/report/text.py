"""A report for people: its table and verdict in the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mergekit_karcher.report.schema import Kind, Report
from mergekit_karcher.report.verdict import NOISE, output_dtype

_DEGREES = math.degrees(1)


def _shown(value: float | None, unit: float = 1, digits: int = 3) -> str:
    return "" if value is None else f"{unit * value:.{digits}g}"


def _lost(length: float | None) -> str:
    return _shown(None if length is None else 1 - length, 100, 2)


def _unless_noise(kind: Kind, shown: str, otherwise: str = "") -> str:
    return otherwise if (kind.task_rounding_median or 0) >= NOISE else shown


Column = tuple[str, Callable[[Kind], str]]

_COLUMNS: Sequence[Column] = (
    ("tensors", lambda kind: str(kind.tensors)),
    ("angle", lambda kind: _shown(kind.angle_median, _DEGREES)),
    ("largest", lambda kind: _shown(kind.angle_largest, _DEGREES)),
    ("spread", lambda kind: _shown(kind.spread_median, _DEGREES)),
    ("lost, %", lambda kind: _lost(kind.linear_length_median)),
    ("to linear", lambda kind: _shown(kind.linear_gap_largest, digits=2)),
    ("not unique", lambda kind: str(kind.not_unique)),
)
_TASK_COLUMNS: Sequence[Column] = (
    ("task angle", lambda k: _unless_noise(k, _shown(k.task_angle_median, _DEGREES), "noise")),
    ("kept, %", lambda k: _unless_noise(k, _shown(k.task_linear_length_median, 100))),
    ("rounding, %", lambda kind: _shown(kind.task_rounding_median, 100)),
)


def legend(report: Report) -> str:
    """A sentence or two for each column of the table."""
    words = (
        "Angles are in degrees. Angle: between two models, the median over tensors and pairs; "
        "largest: the largest of them. Spread: the typical angle from a model to the mean, the "
        "median over tensors. Lost: how much length plain averaging loses. To linear: the largest "
        "difference between Karcher and averaging scaled to the same length, where 1 is what "
        f"{output_dtype(report)} rounding changes (or that of the files, if it is coarser). "
        "Not unique: the tensors whose mean could not be proven unique."
    )
    if report.whole_tasks:
        words += (
            " Task angle: between two task vectors (differences from the base). Kept: how much of "
            "their length plain averaging keeps. Rounding: how much of their length may be "
            f"rounding error of the files (from {100 * NOISE:.0f} % on they are noise)."
        )
    return words


def markdown_table(report: Report) -> str:
    """The table in Markdown, with one row for each kind of module."""
    columns = [*_COLUMNS, *(_TASK_COLUMNS if report.whole_tasks else ())]
    lines = [
        ["module", *(title for title, _ in columns)],
        ["---", *["---:"] * len(columns)],
        *([kind.kind, *(cell(kind) for _, cell in columns)] for kind in report.kinds),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def models_line(report: Report) -> str:
    names = [model.name + (" (base)" if model.is_base else "") for model in report.models]
    return f"Models: {', '.join(names)}."


def markdown(report: Report, plots: Sequence[tuple[str, str]]) -> str:
    """The report in Markdown, without its single tensors, with a (file, title) for each plot."""
    parts = [
        "# Geometry of this merge",
        report.verdict,
        models_line(report),
        markdown_table(report),
        legend(report),
        *(f"![{title}]({file})" for file, title in plots),
    ]
    return "\n\n".join(parts) + "\n"


def show(report: Report, console: Console) -> None:
    """Print the tables and the verdict, in colour if the console is a terminal."""
    console.print(models_line(report), markup=False, highlight=False)
    tables = {"Geometry of this merge": _COLUMNS}
    if report.whole_tasks:
        tables["As seen from the base"] = _TASK_COLUMNS
    for title, columns in tables.items():
        table = Table(title=title, box=box.SIMPLE)
        table.add_column("module", no_wrap=True)
        for name, _ in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for kind in report.kinds:
            table.add_row(kind.kind, *(cell(kind) for _, cell in columns))
        console.print(table)
    console.print(legend(report), markup=False, highlight=False, style="dim")
    console.print(report.verdict, markup=False, highlight=False, style="bold")
