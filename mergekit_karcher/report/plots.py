"""Pictures of a report: angles by layer and module, by pair of models, and lengths by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mergekit_karcher.files import replacing
from mergekit_karcher.report.kinds import ORDER
from mergekit_karcher.report.schema import Report, Tensor, seen
from mergekit_karcher.report.verdict import NOISE

# Cells of the matrix of models are labelled with their angle up to this many models.
_LABELLED = 10

TITLES = {
    "angles.png": "Largest angle between two models, by layer and module",
    "models.png": "Angles between the models",
    "lengths.png": "Length that plain averaging loses, by layer",
}


def draw(report: Report, folder: Path) -> None:
    """Write the PNG files of TITLES; raises ImportError without matplotlib, and OSError."""
    makers = {"angles.png": _heat_map, "models.png": _models, "lengths.png": _lengths}
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


def _labels(axes: Any, layers: Sequence[int | None]) -> None:
    """Label as many layers as there is room for, and tensors outside of them by a dash."""
    step = max(1, math.ceil(len(layers) / 25))
    places = [p for p, layer in enumerate(layers) if layer is None or layer % step == 0]
    labels = ["-" if layers[p] is None else str(layers[p]) for p in places]
    axes.set_xticks(places, labels)
    axes.set_xlabel("layer (-: tensors outside the layers)" if None in layers else "layer")


def _largest(report: Report, tensors: Sequence[Tensor]) -> float:
    angles = [angle for view in seen(tensors, "zero") for angle in view.pairs(report.apart)]
    return math.degrees(max(angles, default=math.nan))


def _cell(tensors: Sequence[Tensor], kind: str, layer: int | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.kind == kind and tensor.layer == layer]


def _heat_map(report: Report, title: str) -> Any:
    layers = _layers(report)
    kinds = [kind for kind in ORDER if any(tensor.kind == kind for tensor in report.tensors)]
    cells = [[_largest(report, _cell(report.tensors, k, la)) for la in layers] for k in kinds]
    width = min(14.0, 4.5 + 0.3 * len(layers))
    figure, (axes,) = _figure(width, 1.6 + 0.32 * len(kinds))
    image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(kinds)), kinds)
    _labels(axes, layers)
    axes.set_title(title, wrap=True)
    figure.colorbar(image, ax=axes, label="degrees")
    return figure


def _models(report: Report, title: str) -> Any:
    views = [("as seen from zero", report.whole)]
    if report.whole_tasks:
        views.append(("as seen from the base (task vectors)", report.whole_tasks))
    size = max(3.2, 0.55 * len(report.models) + 1.5)
    figure, panels = _figure(size + 1.2, (size + 0.8) * len(views), len(views))
    for axes, (origin, view) in zip(panels, views, strict=True):
        shown = [place for place, norm in enumerate(view.norms) if norm]
        names = [f"{report.models[place].name} ({place + 1})" for place in shown]
        degrees = np.degrees(np.array(view.angles, dtype=float)[np.ix_(shown, shown)])
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
        axes.set_title(f"{title},\n{origin}" if axes is panels[0] else origin)
    return figure


def _lengths(report: Report, title: str) -> Any:
    origins = ["zero", "base"] if report.whole_tasks else ["zero"]
    layers = _layers(report)
    width = min(14.0, 5.5 + 0.2 * len(layers))
    figure, panels = _figure(width, 3.4 * len(origins), len(origins))
    for axes, origin in zip(panels, origins, strict=True):
        for number, kind in enumerate(ORDER):
            lost = [_lost(_cell(report.tensors, kind, layer), origin) for layer in layers]
            if not all(map(math.isnan, lost)):
                # No line from the tensors outside the layers to the first layer.
                outside = int(layers[0] is None)
                marker, places = "o" if number % 2 else "s", range(outside, len(layers))
                style = {"markersize": 4, "linewidth": 1, "label": kind}
                (line,) = axes.plot(places, lost[outside:], f"{marker}-", **style)
                if outside:
                    axes.plot(0, lost[0], marker, markersize=4, color=line.get_color())
        _labels(axes, layers)
        axes.set_ylabel("% of the length")
        axes.set_ylim(bottom=0)
        what = "of the weights" if origin == "zero" else "of the task vectors"
        axes.set_title(f"{title}: {what}" if axes is panels[0] else what)
        if axes.lines:
            axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize="small")
    return figure


def _lost(tensors: Sequence[Tensor], origin: str) -> float:
    if origin == "base":
        tensors = [t for t in tensors if max((s for s in t.rounding or () if s), default=0) < NOISE]
    lengths = [view.linear_length for view in seen(tensors, origin)]
    kept = [length for length in lengths if length is not None]
    return 100 * (1 - median(kept)) if kept else math.nan
