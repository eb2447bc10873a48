"""One HTML file with sentences, charts and tables that needs no network and no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergekit_karcher.files import write_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class Table(NamedTuple):
    """A table: its title, the headings of its columns, and its rows of as many cells.

    The first column holds names, the others numbers.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


class Chart(NamedTuple):
    """A chart of plotly with what stands above it.

    plotly reads HTML in the texts of a figure: a name of a model or tensor has to go through
    `as_label` there, and nowhere else.
    """

    title: str
    figure: Figure


class Section(NamedTuple):
    """A part of a page: under its title sentences, a paragraph each, then charts, then tables."""

    title: str
    sentences: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


def as_label(name: str) -> str:
    """A name for a figure, where plotly shows it as it is."""
    # plotly knows no &quot;.
    return escape(name, quote=False)


def write_page(path: Path, title: str, sections: Iterable[Section]) -> None:
    """Write a page, in light and dark, with the whole of plotly.js in it (5 MB).

    Arguments:
        path: The file, replaced if it is there.
        title: Of the page.
        sections: What is on it, in order. A chart has the colours and fonts of the page, so its
            figure should not set a template; without a height it is 450 pixels high.

    Raises:
        ImportError: Without plotly.
        OSError: If the file cannot be written.
    """
    from plotly.io import templates
    from plotly.io.json import to_json_plotly
    from plotly.offline import get_plotlyjs

    sections = list(sections)
    figures = [chart.figure.to_plotly_json() for part in sections for chart in part.charts]
    themes = {theme: templates[f"plotly_{theme}"] for theme in ("white", "dark")}
    source = files(__package__)
    write_text(
        path,
        _PAGE.format(
            title=escape(title),
            style=source.joinpath("page.css").read_text(encoding="utf-8"),
            body="\n".join(_section(part) for part in sections),
            plotly=get_plotlyjs(),
            # Its JSON has no < that could end the script.
            figures=to_json_plotly(figures),
            themes=to_json_plotly(themes),
            script=source.joinpath("page.js").read_text(encoding="utf-8"),
        ),
    )


# The policy holds the page to what it says: nothing is loaded from anywhere.
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{title}</h1><button type="button" id="theme">Light or dark</button></header>
{body}
<script>{plotly}</script>
<script>
const figures = {figures};
const themes = {themes};
{script}</script>
</body>
</html>
"""


def _section(section: Section) -> str:
    parts = [
        f"<h2>{escape(section.title)}</h2>",
        *(f"<p>{escape(sentence)}</p>" for sentence in section.sentences),
        *(
            f"<figure><figcaption>{escape(chart.title)}</figcaption>"
            f'<div class="chart" role="img" aria-label="{escape(chart.title)}"></div></figure>'
            for chart in section.charts
        ),
        *(_table(table) for table in section.tables),
    ]
    return "\n".join(["<section>", *parts, "</section>"])


def _table(table: Table) -> str:
    headings = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in table.headings)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in table.rows
    )
    return (
        f'<div class="table"><table><caption>{escape(table.title)}</caption>\n'
        f"<thead><tr>{headings}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )
