"""Pictures of a report, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_karcher.files import replacing
from mergekit_karcher.report.charts import (
    DEGREES,
    LABELLED,
    TITLES,
    HeatMaps,
    color_limit,
    grid_of,
    heat_maps,
    matrices,
)
from mergekit_karcher.report.schema import Report

# What each file shows.
FILES = {f"{name}.png": title for name, title in TITLES.items()}


def draw(report: Report, folder: Path) -> None:
    """Write those files of FILES that a report has; raises ImportError without matplotlib, and
    OSError."""
    for file, figure in figures(report):
        with replacing(folder / file) as partial:
            figure.savefig(partial, format="png", dpi=100, bbox_inches="tight")


def figures(report: Report) -> Iterator[tuple[str, Any]]:
    """The figure for each file."""
    for name, maps in heat_maps(report).items():
        yield f"{name}.png", _heat_maps(report, TITLES[name], maps)
    yield "models.png", _models(report, TITLES["models"])


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    # Without pyplot, which would change the figures of a program that merges by a call.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def _label_layers(axes: Any, layers: Sequence[int | None]) -> None:
    """Label as many layers as there is room for."""
    step = max(1, math.ceil(len(layers) / 25))
    places = [p for p, layer in enumerate(layers) if layer is None or layer % step == 0]
    labels = ["outside" if layers[p] is None else str(layers[p]) for p in places]
    axes.set_xticks(places, labels)
    if None in layers:
        axes.get_xticklabels()[0].set_rotation(90)
    axes.set_xlabel("layer (outside: tensors of no layer)" if None in layers else "layer")


def _heat_maps(report: Report, title: str, maps: HeatMaps) -> Any:
    kinds, layers, _ = grid = grid_of(report)
    width = min(14.0, 4.5 + 0.3 * len(layers))
    height = (1.9 + 0.32 * len(kinds)) * len(maps.panels)
    figure, all_axes = _figure(width, height, len(maps.panels))
    for axes, (name, value) in zip(all_axes, maps.panels.items(), strict=True):
        cells = grid.cells(value)
        limit, outlying = color_limit(cells)
        image = axes.imshow(
            cells, aspect="auto", cmap="viridis", vmin=0, vmax=maps.highest or limit
        )
        for row, column in np.argwhere(outlying):
            label = f"{cells[row, column]:.3g}"
            axes.text(column, row, label, ha="center", va="center", fontsize="x-small")
        axes.set_yticks(range(len(kinds)), kinds)
        _label_layers(axes, layers)
        axes.set_title(f"{title}:\n{name}" if axes is all_axes[0] else name)
        extend = "max" if outlying.any() and not maps.highest else "neither"
        figure.colorbar(image, ax=axes, label=maps.unit, extend=extend)
    return figure


def _models(report: Report, title: str) -> Any:
    shown = matrices(report)
    size = max(3.2, 0.55 * len(report.models) + 1.5)
    figure, panels = _figure(size + 1.2, (size + 0.8) * len(shown), len(shown))
    for axes, (name, places, degrees) in zip(panels, shown, strict=True):
        names = [f"{report.models[place].name} ({place + 1})" for place in places]
        largest = np.nan_to_num(degrees).max(initial=0)
        image = axes.imshow(degrees, cmap="viridis", vmin=0, vmax=largest or 1.0)
        axes.set_yticks(range(len(places)), names)
        for (row, column), value in np.ndenumerate(degrees if len(places) <= LABELLED else ()):
            if row != column and np.isfinite(value):
                colour = "black" if value > 0.6 * largest else "white"
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour)
        figure.colorbar(image, ax=axes, label=DEGREES, shrink=0.8)
        # Names stand beside the rows; the columns have the same order.
        axes.set_xticks(range(len(places)), [str(place + 1) for place in places])
        axes.set_title(f"{title}:\n{name}" if axes is panels[0] else name, wrap=True)
    return figure
