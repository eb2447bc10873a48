"""A report for people: its tables and sentences in the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from mergekit_karcher.report.apart import plain
from mergekit_karcher.report.page import Table
from mergekit_karcher.report.schema import NOISE, Kind, Report
from mergekit_karcher.report.suggestion import suggestion_of
from mergekit_karcher.report.verdict import advice_on

_DEGREES = math.degrees(1)

# All tables fit into this width; in a narrower terminal their lines are wrapped, and not cut.
_WIDTH = 80
_MODELS_IN_A_TABLE = 8


def _shown(value: float | None, unit: float = 1) -> str:
    return "" if value is None else plain(max(0.0, unit * value)).replace("less than ", "<")


def _lost(length: float | None) -> str:
    return _shown(None if length is None else 1 - length, 100)


def _unless_noise(kind: Kind, shown: str, otherwise: str = "") -> str:
    return otherwise if kind.task_is_noise else shown


class Column(NamedTuple):
    """One column of a table: its heading, its cell for a kind of module, and what it means."""

    title: str
    cell: Callable[[Kind], str]
    meaning: str


_TENSORS = Column("tensors", lambda kind: str(kind.tensors), "")
_WEIGHTS = (
    Column("angle", lambda kind: _shown(kind.angle_average, _DEGREES), ""),
    Column("largest", lambda kind: _shown(kind.angle_largest, _DEGREES), ""),
)
_LOST = Column(
    "lost, %",
    lambda kind: _lost(kind.linear_length_average),
    "Lost: how much of their length plain averaging loses.",
)
_TASKS = (
    Column(
        "angle",
        lambda k: _unless_noise(k, _shown(k.task_angle_average, _DEGREES), "noise"),
        "",
    ),
    Column("largest", lambda k: _unless_noise(k, _shown(k.task_angle_largest, _DEGREES)), ""),
    Column(
        "kept, %",
        lambda k: _unless_noise(k, _shown(k.task_linear_length_average, 100)),
        "Kept: how much of the length of the changes plain averaging keeps.",
    ),
    Column(
        "rounding, %",
        lambda kind: _shown(kind.task_rounding_median, 100),
        "Rounding: how much of the length of the changes may be rounding error of the files (from "
        f"{100 * NOISE:.0f} % on they are noise).",
    ),
)
_DIFFERENCE = Column(
    "differs, %",
    lambda kind: _shown(kind.linear_difference_average, 100),
    "Differs: by how much of its length the Karcher mean is another one than plain averaging.",
)
_NOT_UNIQUE = Column(
    "not unique",
    lambda kind: str(kind.not_unique),
    "Not unique: the tensors whose mean could not be proven unique.",
)
_INPUTS = (
    Column(
        "overlap",
        lambda kind: _unless_noise(kind, _shown(kind.input_overlap_average), "noise"),
        "Overlap: how much the inputs overlap that two models changed the treatment of, from 0 "
        "(other inputs) to 1 (the same).",
    ),
    Column(
        "in use, %",
        lambda kind: _unless_noise(kind, _shown(kind.inputs_in_use_average, 100)),
        "In use: how much of all directions of their inputs the changes take together.",
    ),
)
_DEFINITION = (
    "Angles are in degrees, between two models: on average, where each tensor counts by its number "
    "of parameters, and the largest."
)


def _columns(report: Report) -> dict[str, list[Column]]:
    """The columns of each table, by its title; those of the mean stand where it is taken."""
    weights, tasks = [_TENSORS, *_WEIGHTS], [*_TASKS]
    known = report.overall.input_overlap_average is not None
    inputs = {"The inputs of the linear layers, by the changes": [*_INPUTS]} if known else {}
    if report.overall.shares:
        return {"The weights": weights} | inputs | _shares(report)
    weights.append(_LOST)
    around_base = report.settings.origin == ["base"] and report.whole_tasks is not None
    if report.overall.linear_difference_average is not None and not around_base:
        weights.append(_DIFFERENCE)
    if report.overall.not_unique:
        (tasks if around_base else weights).append(_NOT_UNIQUE)
    of_tasks = {"The changes from the base": tasks} if report.whole_tasks else {}
    return {"The weights": weights} | of_tasks | inputs


def _shares(report: Report) -> dict[str, list[Column]]:
    """Tables with a column for each model that fisher merges, headed by its number."""

    def column(place: int) -> Column:
        return Column(
            str(place + 1), lambda k: _shown(k.shares[place] if k.shares else None, 100), ""
        )

    shares = report.overall.shares or []
    columns = [column(place) for place, share in enumerate(shares) if share is not None]
    parts = [
        columns[start : start + _MODELS_IN_A_TABLE]
        for start in range(0, len(columns), _MODELS_IN_A_TABLE)
    ]
    if len(parts) == 1:
        return {"How much each model counts, in %": columns}
    return {
        f"How much models {part[0].title} to {part[-1].title} count, in %": part for part in parts
    }


def legend(report: Report) -> str:
    """What the columns of the tables mean."""
    columns = (column for columns in _columns(report).values() for column in columns)
    return " ".join([_DEFINITION, *(column.meaning for column in columns if column.meaning)])


def _rows(report: Report, columns: Sequence[Column]) -> Iterable[list[str]]:
    """One for each kind of module that has a number, and one for all where there are several."""
    for kind in [*report.kinds, *([report.overall] if len(report.kinds) > 1 else [])]:
        cells = [column.cell(kind) for column in columns]
        if any(cells):
            yield [kind.kind, *cells]


def tables(report: Report) -> list[Table]:
    """The numbers of each kind of module."""
    return [
        Table(title, ["module", *(column.title for column in columns)], [*_rows(report, columns)])
        for title, columns in _columns(report).items()
    ]


def markdown_tables(report: Report) -> str:
    """The tables in Markdown, each under its title."""
    parts = []
    for title, headings, rows in tables(report):
        lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
        parts += [f"**{title}**", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join(parts)


def models_line(report: Report) -> str:
    """The models by number, as the tables and plots call them."""
    names = [
        f"{number} {model.name}{' (base)' if model.is_base else ''}"
        for number, model in enumerate(report.models, 1)
    ]
    return f"Models: {', '.join(names)}."


def markdown(report: Report, plots: Sequence[tuple[str, str]]) -> str:
    """The report in Markdown, without its single tensors, with a (file, title) for each plot."""
    parts = [
        "# Geometry of this merge",
        report.verdict,
        *advice(report),
        models_line(report),
        markdown_tables(report),
        legend(report),
        *(f"![{title}]({file})" for file, title in plots),
    ]
    return "\n\n".join(parts) + "\n"


def show(report: Report, console: Console) -> None:
    """Print the tables and the sentences, in colour if the console is a terminal."""
    console.width = max(console.width, _WIDTH)
    console.print(models_line(report), markup=False, highlight=False)
    for title, headings, rows in tables(report):
        table = RichTable(title=title, box=box.SIMPLE)
        for place, heading in enumerate(headings):
            table.add_column(heading, justify="right" if place else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(legend(report), markup=False, highlight=False, style="dim")
    console.print(report.verdict, markup=False, highlight=False, style="bold")
    for sentence in advice(report):
        console.print(sentence, markup=False, highlight=False)


def advice(report: Report) -> list[str]:
    """What is known of models like these, and what to do with them, in sentences."""
    known = advice_on(report)
    # What fisher sees of models is no measure of how far they are apart.
    measured = report.overall.shares is None and not report.settings.in_metric
    suggestion = [suggestion_of(report).sentence] if measured else []
    return [*([known] if known else []), *suggestion]
