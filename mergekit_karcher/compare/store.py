"""The folder that a comparison is written to."""

from __future__ import annotations

import logging
from pathlib import Path

from mergekit_karcher.compare.candidates import Candidate
from mergekit_karcher.compare.chart import PNG, draw
from mergekit_karcher.compare.html import HTML, write_html
from mergekit_karcher.compare.result import JSON, Comparison
from mergekit_karcher.compare.words import config_text, markdown
from mergekit_karcher.files import write_text

_LOG = logging.getLogger(__name__)

MARKDOWN, BEST = "compare.md", "best.yml"


def write(comparison: Comparison, chosen: Candidate, folder: Path) -> bool:
    """Write a comparison to a folder, which must exist; returns whether it has its charts.

    compare.json comes last: a folder that has it is complete. Raises OSError if a file cannot be
    written.
    """
    for old in (JSON, PNG, HTML):
        (folder / old).unlink(missing_ok=True)
    try:
        draw(comparison, folder)
        write_html(comparison, folder)
    except ImportError:
        _LOG.debug("no chart", exc_info=True)
    has_chart = (folder / PNG).is_file()
    write_text(folder / MARKDOWN, markdown(comparison, PNG if has_chart else None))
    write_text(folder / BEST, config_text(comparison, chosen))
    write_text(folder / JSON, comparison.model_dump_json(by_alias=True) + "\n")
    return (folder / HTML).is_file()
