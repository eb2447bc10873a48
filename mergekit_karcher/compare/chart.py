"""The picture of a comparison: how much each merge differs from the reference, text by text."""

from __future__ import annotations

from pathlib import Path

from mergekit_karcher.compare.result import Comparison
from mergekit_karcher.files import replacing

PNG = "compare.png"

_CHOSEN, _OTHER = "#c0392b", "#2c3e50"


def draw(comparison: Comparison, folder: Path) -> None:
    """Write PNG to a folder; raises ImportError without matplotlib, and OSError."""
    # Without pyplot, which would change the figures of a program that compares by a call.
    from matplotlib.figure import Figure

    merges = comparison.merges[::-1]
    reference = comparison.entry(comparison.reference).reporting
    factor = 1.0 if comparison.measure == "bits per byte" else 100.0
    figure = Figure(figsize=(8.5, 1.6 + 0.42 * len(merges)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.6", linewidth=1)
    for number, text in enumerate(comparison.texts):
        values = [
            factor * (merge.reporting.rates[text.name] - reference.rates[text.name])
            for merge in merges
        ]
        marker = "osD^vP"[number % 6]
        axes.plot(
            values, range(len(merges)), marker, color=f"C{number}", alpha=0.6, label=text.name
        )
    for place, merge in enumerate(merges):
        axes.errorbar(
            factor * (merge.reporting.difference or 0.0),
            place,
            xerr=factor * (merge.reporting.error or 0.0),
            fmt="|",
            markersize=16,
            markeredgewidth=3,
            capsize=3,
            color=_CHOSEN if merge.name == comparison.chosen else _OTHER,
            label="mean ± standard error" if place == 0 else None,
        )
    axes.set_yticks(range(len(merges)), [merge.name for merge in merges])
    for label, merge in zip(axes.get_yticklabels(), merges, strict=True):
        if merge.name == comparison.chosen:
            label.set(color=_CHOSEN, fontweight="bold")
    unit = "bits per byte" if comparison.measure == "bits per byte" else "errors in per cent"
    axes.set_xlabel(f"{unit}, difference to {comparison.reference} (less is better)")
    axes.set_title("The chosen merge is red; the best on the windows to choose by is on top")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    with replacing(folder / PNG) as partial:
        figure.savefig(partial, format="png", dpi=110, bbox_inches="tight")
