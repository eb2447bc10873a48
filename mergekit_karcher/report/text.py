"""A report for people: its table and verdict in the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mergekit_karcher.report.schema import Kind, Report
from mergekit_karcher.report.verdict import NOISE, output_dtype


def _angle(value: float | None) -> str:
    return "" if value is None else f"{math.degrees(value):.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g}"


def _lost(length: float | None) -> str:
    return "" if length is None else f"{100 * (1 - length):.2g}"


def _is_noise(kind: Kind) -> bool:
    return kind.task_rounding_median is not None and kind.task_rounding_median >= NOISE


def _task_angle(kind: Kind) -> str:
    return "noise" if _is_noise(kind) else _angle(kind.task_angle_median)


def _kept(kind: Kind) -> str:
    return "" if _is_noise(kind) else _percent(kind.task_linear_length_median)


Column = tuple[str, Callable[[Kind], str]]

_COLUMNS: Sequence[Column] = (
    ("tensors", lambda kind: str(kind.tensors)),
    ("angle", lambda kind: _angle(kind.angle_median)),
    ("largest", lambda kind: _angle(kind.angle_largest)),
    ("spread", lambda kind: _angle(kind.spread_median)),
    ("lost, %", lambda kind: _lost(kind.linear_length_median)),
    ("to linear", lambda kind: _number(kind.linear_gap_largest)),
    ("not unique", lambda kind: str(kind.not_unique)),
)
_TASK_COLUMNS: Sequence[Column] = (
    ("task angle", _task_angle),
    ("kept, %", _kept),
    ("rounding, %", lambda kind: _percent(kind.task_rounding_median)),
)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _columns(report: Report) -> list[Column]:
    return [*_COLUMNS, *(_TASK_COLUMNS if report.whole_tasks else ())]


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
    columns = _columns(report)
    lines = [
        ["module", *(title for title, _ in columns)],
        ["---", *["---:"] * len(columns)],
        *([kind.kind, *(cell(kind) for _, cell in columns)] for kind in report.kinds),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def models_line(report: Report) -> str:
    """The sentence that names the models."""
    names = [model.name + (" (base)" if model.is_base else "") for model in report.models]
    return f"Models: {', '.join(names)}."


def markdown(report: Report, plots: Sequence[tuple[str, str]]) -> str:
    """The report in Markdown, without its single tensors.

    Arguments:
        report: What to tell.
        plots: (file, title) of each picture to show.
    """
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
    console.print(_table(report, "Geometry of this merge", _COLUMNS))
    if report.whole_tasks:
        console.print(_table(report, "As seen from the base", _TASK_COLUMNS))
    console.print(legend(report), markup=False, highlight=False, style="dim")
    console.print(report.verdict, markup=False, highlight=False, style="bold")


def _table(report: Report, title: str, columns: Sequence[Column]) -> Table:
    table = Table(title=title, box=box.SIMPLE)
    table.add_column("module", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for kind in report.kinds:
        table.add_row(kind.kind, *(cell(kind) for _, cell in columns))
    return table
