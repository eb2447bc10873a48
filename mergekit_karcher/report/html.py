"""A report as one HTML page, whose charts show the tensors behind each number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mergekit_karcher.report.apart import plain
from mergekit_karcher.report.charts import (
    DEGREES,
    LABELLED,
    TITLES,
    Grid,
    HeatMaps,
    Matrix,
    Value,
    color_limit,
    grid_of,
    heat_maps,
    matrices,
)
from mergekit_karcher.report.page import Chart, Section, as_label, write_page
from mergekit_karcher.report.schema import Report
from mergekit_karcher.report.text import advice, legend, models_line, tables
from mergekit_karcher.sphere.trig import Floats

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# The tensors of a cell that are named when the mouse is over it, those with the largest numbers.
_NAMED = 8

# Longer names of models are cut where they stand beside a chart.
_LONGEST_LABEL = 24


def write_html(report: Report, path: Path) -> None:
    """Write a report as a page; raises ImportError without plotly, and OSError."""
    write_page(path, "Geometry of this merge", _sections(report))


def _sections(report: Report) -> Iterator[Section]:
    yield Section("The models", [report.verdict, *advice(report), models_line(report)])
    grid = grid_of(report)
    charts = {
        name: [Chart(panel, _heat_map(grid, maps, value)) for panel, value in maps.panels.items()]
        for name, maps in heat_maps(report).items()
    }
    charts["models"] = [Chart(shown.name, _matrix(report, shown)) for shown in matrices(report)]
    for name, title in TITLES.items():
        if name in charts:
            yield Section(title, charts=charts[name])
    yield Section("Numbers by kind of module", [legend(report)], tables=tables(report))


def _heat_map(grid: Grid, maps: HeatMaps, value: Value) -> Figure:
    cells = grid.cells(value)
    limit, outlying = color_limit(cells)
    layers = ["outside" if layer is None else str(layer) for layer in grid.layers]
    hover = [
        [_tensors_in(grid, kind, layer, value, maps.unit) for layer in grid.layers]
        for kind in grid.kinds
    ]
    figure = _colored(
        layers,
        grid.kinds,
        cells,
        maps.highest or limit,
        _numbers(cells, outlying),
        hover,
        maps.unit,
    )
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="kind of module")
    return figure.update_layout(height=120 + 26 * len(grid.kinds))


def _tensors_in(grid: Grid, kind: str, layer: int | None, value: Value, unit: str) -> str:
    """What a cell shows under the mouse: its place and number, and its tensors with theirs."""
    tensors = grid.tensors.get((kind, layer), [])
    values = {tensor.name: value([tensor]) for tensor in tensors}
    known = {name: number for name, number in values.items() if math.isfinite(number)}
    if not known:
        return ""
    place = f"{kind}, {'outside the layers' if layer is None else f'layer {layer}'}"
    if len(known) == 1:
        ((name, number),) = known.items()
        return f"{as_label(name)}<br>{place}<br>{_amount(number, unit)}"
    largest = sorted(known.items(), key=lambda item: -item[1])
    lines = [f"{as_label(name)}: {_amount(number, unit)}" for name, number in largest[:_NAMED]]
    if len(known) > _NAMED:
        lines.append(f"and {len(known) - _NAMED} more")
    average = _amount(value(tensors), unit)
    return "<br>".join([place, f"{average}, on average over {len(known)} tensors", *lines])


def _matrix(report: Report, matrix: Matrix) -> Figure:
    names = [report.models[place].name for place in matrix.places]
    numbers = [str(place + 1) for place in matrix.places]
    degrees = matrix.degrees
    apart = ~np.eye(len(names), dtype=bool) & np.isfinite(degrees)
    hover = [
        [
            f"{as_label(first)}<br>{as_label(second)}<br>{_amount(degrees[row, column], DEGREES)}"
            if apart[row, column]
            else ""
            for column, second in enumerate(names)
        ]
        for row, first in enumerate(names)
    ]
    labelled = apart & (len(names) <= LABELLED)
    limit = np.nan_to_num(degrees).max(initial=0) or 1.0
    rows = [f"{_shortened(name)} ({number})" for name, number in zip(names, numbers, strict=True)]
    figure = _colored(numbers, rows, degrees, limit, _numbers(degrees, labelled), hover, DEGREES)
    figure.update_xaxes(title_text="model, by its number")
    figure.update_yaxes(title_text="model")
    return figure.update_layout(height=110 + min(400, 45 * len(names)))


def _colored(
    columns: Sequence[str],
    rows: Sequence[str],
    cells: Floats,
    limit: float,
    labels: list[list[str]],
    hover: list[list[str]],
    unit: str,
) -> Figure:
    """Cells in colours from zero to a limit, with what is written on each and shown above it."""
    from plotly.graph_objects import Figure, Heatmap

    heat_map = Heatmap(
        x=columns,
        y=rows,
        z=cells,
        zmin=0,
        zmax=limit,
        colorscale="Viridis",
        colorbar={"title": {"text": unit, "side": "right"}, "thickness": 12},
        text=labels,
        texttemplate="%{text}",
        hovertext=hover,
        hoverinfo="text",
        hoverongaps=False,
        xgap=1,
        ygap=1,
    )
    # A number as a label is a name here, and no place on the axis.
    axis = {
        "type": "category",
        "showgrid": False,
        "fixedrange": True,
        "automargin": True,
    }
    return Figure(
        heat_map,
        {
            "xaxis": axis,
            "yaxis": {**axis, "autorange": "reversed"},
            "margin": {"l": 20, "r": 20, "t": 30, "b": 50},
            "hoverlabel": {"align": "left"},
        },
    )


def _numbers(cells: Floats, written: NDArray[np.bool_]) -> list[list[str]]:
    """What is written on cells."""
    return [
        [f"{value:.3g}" if shown else "" for value, shown in zip(*row, strict=True)]
        for row in zip(cells, written, strict=True)
    ]


def _amount(value: float, unit: str) -> str:
    return f"{plain(max(0.0, value))} {unit}"


def _shortened(name: str) -> str:
    """The last part of a name, so that it leaves room for the chart on a narrow screen."""
    last = name.rsplit("/", 1)[-1]
    cut = last if len(last) <= _LONGEST_LABEL else f"{last[: _LONGEST_LABEL - 1]}…"
    return as_label(cut)
