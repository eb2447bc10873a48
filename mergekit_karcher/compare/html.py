"""A comparison as one page whose chart tells merge, text and value under the mouse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_karcher.compare.result import Comparison
from mergekit_karcher.compare.words import sentences, table
from mergekit_karcher.report.page import Chart, Section, as_label, write_page

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

HTML = "compare.html"

_ROW_PIXELS = 34
_CHOSEN = "#c0392b"


def write_html(comparison: Comparison, folder: Path) -> None:
    """Write HTML to a folder; raises ImportError without plotly, and OSError."""
    chart = Chart(f"Differences to {comparison.reference}", _figure(comparison))
    parts = [
        Section("What came of it", list(sentences(comparison))),
        Section("Merges", charts=[chart]),
        Section("All numbers", tables=[table(comparison)]),
    ]
    write_page(folder / HTML, "Which merge?", parts)


def _figure(comparison: Comparison) -> Figure:
    from plotly.graph_objects import Figure, Scatter

    merges = comparison.merges[::-1]
    names = [as_label(merge.name) for merge in merges]
    reference = comparison.entry(comparison.reference).reporting
    is_text = comparison.measure == "bits per byte"
    factor, unit = (1.0, "bits per byte") if is_text else (100.0, "% of errors")
    figure = Figure()
    for text in comparison.texts:
        rates = [merge.reporting.rates[text.name] for merge in merges]
        figure.add_trace(
            Scatter(
                x=[factor * (rate - reference.rates[text.name]) for rate in rates],
                y=names,
                name=as_label(text.name),
                mode="markers",
                customdata=[factor * rate for rate in rates],
                hovertemplate=f"%{{y}}<br>{as_label(text.name)}: %{{customdata:.4g}} {unit}, "
                "%{x:+.3g}<extra></extra>",
            )
        )
    colours = [_CHOSEN if merge.name == comparison.chosen else "gray" for merge in merges]
    figure.add_trace(
        Scatter(
            x=[factor * (merge.reporting.difference or 0.0) for merge in merges],
            y=names,
            error_x={"array": [factor * (merge.reporting.error or 0.0) for merge in merges]},
            name="mean \u00b1 standard error",
            mode="markers",
            marker={"symbol": "diamond", "size": 11, "color": colours},
            hovertemplate="%{y}<br>mean: %{x:+.3g}<extra></extra>",
        )
    )
    figure.update_layout(
        height=160 + _ROW_PIXELS * len(merges),
        xaxis_title=f"{unit}, difference to {as_label(comparison.reference)} (less is better)",
        yaxis_automargin=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    return figure
