"""Rows as charts: language models by contestant, eight tasks over the lambda of task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from contestants import BASE, LAMBDAS, LINEAR, TASK_ARITHMETIC
from matplotlib import pyplot
from matplotlib.axes import Axes
from rows import Row
from summary import BETTER, Group, groups

_OURS = "karcher model, base"
_LANGUAGE = "bits per byte"
# What the chart of language models shows beside the best task arithmetic.
_SHOWN = (
    "karcher tensor, base",
    "karcher row, base",
    "karcher row, base, linear length",
    "self, ridge 0.3",
    "input Grams, 16 windows, ridge 0.1",
    "TSV-M",
    "Iso-C",
    "ties",
)
_COLUMNS = 3
_WIDTH, _HEIGHT = 5.0, 4.0


def plot(rows: Sequence[Row], path: Path) -> None:
    """One panel of all language models, and one for each set and size of eight tasks."""
    with_base = [group for group in groups(rows) if BASE in group.results]
    language = [group for group in with_base if _LANGUAGE in group.metrics]
    panels: dict[str, list[Group]] = {}
    for group in with_base:
        if "width" in group.case:
            panels.setdefault(f"{group.section}, width {group.case['width']}", []).append(group)
    mpl.use("Agg")
    lines = -(-len(panels) // _COLUMNS)
    figure = pyplot.figure(
        figsize=(_WIDTH * _COLUMNS, _HEIGHT * (lines + 1.6)), layout="constrained"
    )
    grid = figure.add_gridspec(lines + 1, _COLUMNS, height_ratios=[1.6] + [1] * lines)
    if language:
        _points(figure.add_subplot(grid[0, :]), language)
    for index, (title, found) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[1 + index // _COLUMNS, index % _COLUMNS])
        _curves(axes, found, title)
    figure.savefig(path, dpi=72)
    pyplot.close(figure)


def _points(axes: Axes, found: Sequence[Group]) -> None:
    lambdas = [f"{TASK_ARITHMETIC} {value}" for value in LAMBDAS]
    rows = [*_SHOWN, f"best {TASK_ARITHMETIC}"]
    for number, group in enumerate(found):
        best = min(lambdas, key=lambda name: group.estimate(name, "mean", _LANGUAGE).mean)
        measured = [
            (place, group.minus_linear(name, "mean", _LANGUAGE))
            for place, name in enumerate([*_SHOWN, best])
            if name in group.results
        ]
        # Side by side, lest the error bars of one hide the others.
        aside = 0.13 * (number - (len(found) - 1) / 2)
        axes.errorbar(
            [estimate.mean for _, estimate in measured],
            [place + aside for place, _ in measured],
            xerr=[estimate.error for _, estimate in measured],
            fmt="o",
            capsize=3,
            label=f"{group.section}, N = {group.case['N']}",
        )
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_title("Language models: bits per byte, minus those of linear (less is better)")
    axes.legend()


def _curves(axes: Axes, found: Sequence[Group], title: str) -> None:
    metric = found[0].metrics[0]
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
            label=f"N = {group.case['N']}",
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
    axes.set_xlabel("lambda of task arithmetic")
    side = "more" if BETTER[metric] is max else "less"
    axes.set_ylabel(f"{metric} minus linear's ({side} is better)")
    axes.set_title(title)
    axes.legend(fontsize="small")
