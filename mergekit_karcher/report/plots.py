"""Pictures of a report: angles and lengths by layer and module, and angles by pair of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_karcher.files import replacing
from mergekit_karcher.report.apart import apart, average, average_by_pair
from mergekit_karcher.report.kinds import ORDER
from mergekit_karcher.report.schema import NOISE, Report, Tensor
from mergekit_karcher.sphere.trig import Floats

# Cells of the matrix of models are labelled with their angle up to this many models.
_LABELLED = 10

# A cell is outlying if it is this many times as large as the next to largest tenth of all.
_OUTLYING = 2.0

TITLES = {
    "angles.png": "Angle between two models, on average, by layer and module",
    "models.png": "Angle between every two models, on average",
    "lengths.png": "Length that plain averaging loses, by layer and module",
    "shares.png": "How much each model counts, by layer and module",
}


def draw(report: Report, folder: Path) -> None:
    """Write the PNG files of TITLES; raises ImportError without matplotlib, and OSError.

    What plain averaging loses is of no use to fisher, and only fisher has shares.
    """
    makers = {"angles.png": _angles, "models.png": _models}
    makers |= {"shares.png": _shares} if report.overall.shares else {"lengths.png": _lengths}
    for file, make in makers.items():
        figure = make(report, TITLES[file])
        with replacing(folder / file) as partial:
            figure.savefig(partial, format="png", dpi=100, bbox_inches="tight")


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    # Without pyplot, which would change the figures of a program that merges by a call.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def _layers(report: Report) -> list[int | None]:
    """The layers in order; None stands for tensors outside the layers, and comes first."""
    layers = {tensor.layer for tensor in report.tensors}
    return sorted(layers, key=lambda layer: -1 if layer is None else layer)


def _label_layers(axes: Any, layers: Sequence[int | None]) -> None:
    """Label as many layers as there is room for."""
    step = max(1, math.ceil(len(layers) / 25))
    places = [p for p, layer in enumerate(layers) if layer is None or layer % step == 0]
    labels = ["outside" if layers[p] is None else str(layers[p]) for p in places]
    axes.set_xticks(places, labels)
    if None in layers:
        axes.get_xticklabels()[0].set_rotation(90)
    axes.set_xlabel("layer (outside: tensors of no layer)" if None in layers else "layer")


def _heat_maps(
    report: Report,
    title: str,
    unit: str,
    panels: dict[str, Callable[[list[Tensor]], float]],
    highest: float | None = None,
) -> Any:
    """A heat map by module and layer for each panel, whose function gives the value of a cell.

    highest: where the colour scale ends; by default where it shows each panel best.
    """
    layers = _layers(report)
    kinds = [kind for kind in ORDER if any(tensor.kind == kind for tensor in report.tensors)]
    width = min(14.0, 4.5 + 0.3 * len(layers))
    figure, all_axes = _figure(width, (1.9 + 0.32 * len(kinds)) * len(panels), len(panels))
    for axes, (name, value) in zip(all_axes, panels.items(), strict=True):
        cells = np.array(
            [
                [
                    value([t for t in report.tensors if (t.kind, t.layer) == (kind, layer)])
                    for layer in layers
                ]
                for kind in kinds
            ]
        )
        limit, outlying = color_limit(cells)
        image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=highest or limit)
        for row, column in np.argwhere(outlying):
            label = f"{cells[row, column]:.3g}"
            axes.text(column, row, label, ha="center", va="center", fontsize="x-small")
        axes.set_yticks(range(len(kinds)), kinds)
        _label_layers(axes, layers)
        axes.set_title(f"{title}:\n{name}" if axes is all_axes[0] else name)
        extend = "max" if outlying.any() and not highest else "neither"
        figure.colorbar(image, ax=axes, label=unit, extend=extend)
    return figure


def color_limit(cells: Floats) -> tuple[float, Any]:
    """Where a colour scale ends, and which cells are so far beyond the others that it leaves them.

    Without that, one cell takes all the colours, and the others look alike.
    """
    known = cells[np.isfinite(cells)]
    if not known.size:
        return 1.0, np.zeros(cells.shape, bool)
    limit = _OUTLYING * np.quantile(known, 0.9, method="lower")
    outlying = np.nan_to_num(cells) > limit if limit > 0 else np.zeros(cells.shape, bool)
    return float(known[known <= limit].max() if outlying.any() else known.max()) or 1.0, outlying


def _angles(report: Report, title: str) -> Any:
    base = next((place for place, model in enumerate(report.models) if model.is_base), None)

    def cell(origin: str, without: Sequence[int]) -> Callable[[list[Tensor]], float]:
        def degrees(tensors: list[Tensor]) -> float:
            angle = apart(_heard(tensors, origin), origin, base, without).average
            return math.nan if angle is None else math.degrees(angle)

        return degrees

    panels = {"the weights": cell("zero", ())}
    if report.whole_tasks:
        panels["the changes from the base"] = cell("base", report.noise)
    return _heat_maps(report, title, "degrees", panels)


def _lengths(report: Report, title: str) -> Any:
    def cell(origin: str) -> Callable[[list[Tensor]], float]:
        def lost(tensors: list[Tensor]) -> float:
            views = [(t.view(origin), t.size) for t in _heard(tensors, origin)]
            kept = average([(view.linear_length, size) for view, size in views if view])
            return math.nan if kept is None else 100 * (1 - kept)

        return lost

    panels = {"of the weights": cell("zero")}
    if report.whole_tasks:
        panels["of the changes from the base"] = cell("base")
    return _heat_maps(report, title, "% of the length", panels)


def _shares(report: Report, title: str) -> Any:
    def cell(place: int) -> Callable[[list[Tensor]], float]:
        def share(tensors: list[Tensor]) -> float:
            value = average([(t.shares[place], t.size) for t in tensors if t.shares])
            return math.nan if value is None else 100 * value

        return share

    shares = enumerate(report.overall.shares or [])
    panels = {report.models[place].name: cell(place) for place, share in shares if share}
    return _heat_maps(report, title, "% of a parameter", panels, highest=100)


def _heard(tensors: Sequence[Tensor], origin: str) -> list[Tensor]:
    """Those that are more than rounding error as seen from that origin."""
    if origin == "zero":
        return list(tensors)
    return [t for t in tensors if max((s for s in t.rounding or () if s), default=0) < NOISE]


def _models(report: Report, title: str) -> Any:
    origins = {"zero": "the weights"}
    if report.whole_tasks:
        origins["base"] = "the changes from the base"
    size = max(3.2, 0.55 * len(report.models) + 1.5)
    figure, panels = _figure(size + 1.2, (size + 0.8) * len(origins), len(origins))
    for axes, (origin, name) in zip(panels, origins.items(), strict=True):
        angles = np.degrees(average_by_pair(report.tensors, origin, len(report.models)))
        shown = np.flatnonzero(np.isfinite(angles).any(1))
        names = [f"{report.models[place].name} ({place + 1})" for place in shown]
        degrees = angles[np.ix_(shown, shown)]
        largest = np.nan_to_num(degrees).max(initial=0)
        image = axes.imshow(degrees, cmap="viridis", vmin=0, vmax=largest or 1.0)
        axes.set_yticks(range(len(shown)), names)
        for (row, column), value in np.ndenumerate(degrees if len(shown) <= _LABELLED else ()):
            if row != column and np.isfinite(value):
                colour = "black" if value > 0.6 * largest else "white"
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour)
        figure.colorbar(image, ax=axes, label="degrees", shrink=0.8)
        # Names stand beside the rows; the columns have the same order.
        axes.set_xticks(range(len(shown)), [str(place + 1) for place in shown])
        axes.set_title(f"{title}:\n{name}" if axes is panels[0] else name, wrap=True)
    return figure
