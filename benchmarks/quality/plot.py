"""Rows as charts: who is better than the linear merge, and task arithmetic over its lambda."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from contestants import BASE, LAMBDAS, LINEAR, OWN, TASK_ARITHMETIC
from matplotlib import pyplot
from matplotlib.axes import Axes
from rows import Row
from summary import BETTER, Group, groups
from tables import GEOMETRY

_OURS = "karcher model, base"
_ROW_HEIGHT = 4.2
_WIDTH = 12
_SETS_A_LINE = 3


def plot(rows: Sequence[Row], path: Path) -> None:
    """Two panels for each set and size; different numbers of experts share them."""
    panels: dict[str, list[Group]] = {}
    for group in groups(rows):
        width = f", width {group.case['width']}" if "width" in group.case else ""
        panels.setdefault(f"{group.section}{width}", []).append(group)
    mpl.use("Agg")
    lines = math.ceil(len(panels) / _SETS_A_LINE)
    figure, axes = pyplot.subplots(
        lines,
        2 * _SETS_A_LINE,
        figsize=(_WIDTH * _SETS_A_LINE, _ROW_HEIGHT * lines),
        layout="constrained",
        squeeze=False,
    )
    pairs = axes.reshape(-1, 2)
    for unused in pairs[len(panels) :].flat:
        unused.set_axis_off()
    for (title, found), (left, right) in zip(panels.items(), pairs, strict=False):
        # Accuracies of networks that do not share a start are all near chance: their loss tells.
        shared = BASE in found[0].results
        metric = found[0].metrics[0 if shared else -1]
        _points(left, found, title, metric)
        if shared:
            _curves(right, found, metric)
        else:
            right.set_axis_off()
    figure.savefig(path, dpi=64)
    pyplot.close(figure)


def _points(axes: Axes, found: Sequence[Group], title: str, metric: str) -> None:
    names = [
        name
        for name in found[0].results
        if name not in (GEOMETRY, OWN, LINEAR) and not name.startswith(TASK_ARITHMETIC)
    ]
    for number, group in enumerate(found):
        estimates = [group.minus_linear(name, "mean", metric) for name in names]
        # Side by side, lest the error bars of one hide the others.
        places = [place + 0.22 * (number - (len(found) - 1) / 2) for place in range(len(names))]
        axes.errorbar(
            [estimate.mean for estimate in estimates],
            places,
            xerr=[estimate.error for estimate in estimates],
            fmt="o",
            capsize=3,
            label=f"N = {group.case['N']}",
        )
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.set_xlabel(_label(metric))
    axes.legend()


def _curves(axes: Axes, found: Sequence[Group], metric: str) -> None:
    reach = 0.0
    for number, group in enumerate(found):
        colour = f"C{number}"
        curve = {
            value: group.minus_linear(f"{TASK_ARITHMETIC} {value}", "mean", metric)
            for value in LAMBDAS
        }
        curve[1 / group.case["N"]] = group.minus_linear(LINEAR, "mean", metric)
        places = sorted(curve)
        axes.errorbar(
            places,
            [curve[place].mean for place in places],
            yerr=[curve[place].error for place in places],
            capsize=3,
            color=colour,
            label=f"task arithmetic, N = {group.case['N']}",
        )
        axes.plot(1 / group.case["N"], 0, "o", color=colour, label="" if number else "linear")
        place = group.estimate(_OURS, "effective_lambda").mean
        height = group.minus_linear(_OURS, "mean", metric).mean
        axes.plot(place, height, "*", color=colour, markersize=12, label="" if number else _OURS)
        reach = max(reach, abs(height), abs(group.minus_linear(BASE, "mean", metric).mean))
    # A lambda that is much too large would leave nothing to be seen of the others.
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2 * reach), min(high, 2 * reach))
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xlabel("lambda")
    axes.set_ylabel(_label(metric))
    axes.legend(fontsize="small")


def _label(metric: str) -> str:
    side = "more" if BETTER[metric] is max else "less"
    return f"mean {metric}, minus that of linear ({side} is better)"
