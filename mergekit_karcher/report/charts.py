"""What the charts of a report show, as numbers: angles, lengths and shares by layer and module, and
angles by pair of models."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mergekit_karcher.report.apart import apart, average, average_by_pair
from mergekit_karcher.report.kinds import ORDER
from mergekit_karcher.report.schema import NOISE, Report, Tensor
from mergekit_karcher.sphere.trig import Floats

TITLES = {
    "angles": "Angle between two models, on average, by layer and module",
    "models": "Angle between every two models, on average",
    "lengths": "Length that plain averaging loses, by layer and module",
    "shares": "How much each model counts, by layer and module",
}

DEGREES = "degrees"

# Cells of the matrix of models are labelled with their angle up to this many models.
LABELLED = 10

# A cell is outlying if it is this many times as large as the next to largest tenth of all.
_OUTLYING = 2.0

# The number that a heat map shows for some tensors; NaN where they have none.
Value = Callable[[list[Tensor]], float]


class HeatMaps(NamedTuple):
    """Heat maps by layer and kind of module that belong together.

    unit: of all numbers.
    panels: what each heat map is of, and its numbers.
    highest: where the colour scale ends; None for where it shows each panel best.
    """

    unit: str
    panels: dict[str, Value]
    highest: float | None = None


class Grid(NamedTuple):
    """The tensors of a report by kind of module and layer.

    layers: in order; None stands for tensors outside the layers, and comes first.
    tensors: those of each kind and layer.
    """

    kinds: list[str]
    layers: list[int | None]
    tensors: dict[tuple[str, int | None], list[Tensor]]

    def cells(self, value: Value) -> Floats:
        """The number of each cell, (kinds, layers); NaN where there is none."""
        return np.array(
            [
                [value(self.tensors.get((kind, layer), [])) for layer in self.layers]
                for kind in self.kinds
            ]
        )


class Matrix(NamedTuple):
    """The average angle between every two models, as seen from one origin.

    name: what has these angles.
    places: of the models that have any, in the report.
    degrees: (places, places); NaN where two models cannot be compared.
    """

    name: str
    places: list[int]
    degrees: Floats


def grid_of(report: Report) -> Grid:
    """The tensors of a report by kind of module and layer."""
    tensors = defaultdict(list)
    for tensor in report.tensors:
        tensors[tensor.kind, tensor.layer].append(tensor)
    kinds = {kind for kind, _ in tensors}
    layers = {layer for _, layer in tensors}
    return Grid(
        [kind for kind in ORDER if kind in kinds],
        sorted(layers, key=lambda layer: -1 if layer is None else layer),
        tensors,
    )


def heat_maps(report: Report) -> dict[str, HeatMaps]:
    """The heat maps of a report, by their name in TITLES.

    What plain averaging loses is of no use to fisher, and only fisher has shares.
    """
    name, maps = ("shares", _shares) if report.overall.shares else ("lengths", _lengths)
    return {"angles": _angles(report), name: maps(report)}


def matrices(report: Report) -> list[Matrix]:
    """The angles of the weights, and of the changes from the base where there is one."""
    origins = {"zero": "the weights"}
    if report.whole_tasks:
        origins["base"] = "the changes from the base"
    result = []
    for origin, name in origins.items():
        degrees = np.degrees(average_by_pair(report.tensors, origin, len(report.models)))
        places = np.flatnonzero(np.isfinite(degrees).any(1))
        result.append(Matrix(name, places.tolist(), degrees[np.ix_(places, places)]))
    return result


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


def _angles(report: Report) -> HeatMaps:
    base = next((place for place, model in enumerate(report.models) if model.is_base), None)

    def cell(origin: str, without: Sequence[int]) -> Value:
        def degrees(tensors: list[Tensor]) -> float:
            angle = apart(_heard(tensors, origin), origin, base, without).average
            return math.nan if angle is None else math.degrees(angle)

        return degrees

    panels = {"the weights": cell("zero", ())}
    if report.whole_tasks:
        panels["the changes from the base"] = cell("base", report.noise)
    return HeatMaps(DEGREES, panels)


def _lengths(report: Report) -> HeatMaps:
    def cell(origin: str) -> Value:
        def lost(tensors: list[Tensor]) -> float:
            views = [(t.view(origin), t.size) for t in _heard(tensors, origin)]
            kept = average([(view.linear_length, size) for view, size in views if view])
            return math.nan if kept is None else 100 * (1 - kept)

        return lost

    panels = {"of the weights": cell("zero")}
    if report.whole_tasks:
        panels["of the changes from the base"] = cell("base")
    return HeatMaps("% of the length", panels)


def _shares(report: Report) -> HeatMaps:
    def cell(place: int) -> Value:
        def share(tensors: list[Tensor]) -> float:
            value = average([(t.shares[place], t.size) for t in tensors if t.shares])
            return math.nan if value is None else 100 * value

        return share

    shares = enumerate(report.overall.shares or [])
    panels = {report.models[place].name: cell(place) for place, share in shares if share}
    return HeatMaps("% of a parameter", panels, highest=100)


def _heard(tensors: Sequence[Tensor], origin: str) -> list[Tensor]:
    """Those that are more than rounding error as seen from that origin."""
    if origin == "zero":
        return list(tensors)
    return [t for t in tensors if max((s for s in t.rounding or () if s), default=0) < NOISE]
