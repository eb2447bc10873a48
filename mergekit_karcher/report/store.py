"""The folder that a report is written to, and read from."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from pydantic import ValidationError

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import replacing, write_text
from mergekit_karcher.report.html import write_html
from mergekit_karcher.report.plots import FILES, draw
from mergekit_karcher.report.schema import SCHEMA, Report
from mergekit_karcher.report.text import markdown

_LOG = logging.getLogger(__name__)

JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"
_NOT_INSTALLED = (
    "The report has no {what}, because {library} is not installed: "
    "pip install 'mergekit-karcher[report]' adds {it}."
)


def make_folder(folder: Path) -> None:
    """Make the folder of a report, before the work that fills it begins.

    Raises KarcherError if it cannot be made, or no file can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise KarcherError(
            f"The report cannot be written to {folder} ({error.strerror}): name another folder."
        ) from None


def write(report: Report, folder: Path) -> list[str]:
    """Write a report to a folder, which must exist.

    The files of an older report are deleted first, and report.json comes last: a folder that has it
    is complete.

    Returns:
        A sentence on each part that was left out because its library is not installed.

    Raises:
        OSError: If a file cannot be written.
    """
    for old in (JSON, HTML, *FILES):
        (folder / old).unlink(missing_ok=True)
    left_out = []
    try:
        draw(report, folder)
    except ImportError:
        _LOG.debug("no plots", exc_info=True)
        left_out.append(_NOT_INSTALLED.format(what="plots", library="matplotlib", it="them"))
    try:
        write_html(report, folder / HTML)
    except ImportError:
        _LOG.debug("no %s", HTML, exc_info=True)
        left_out.append(_NOT_INSTALLED.format(what=HTML, library="plotly", it="it"))
    write_text(folder / MARKDOWN, markdown(report, plots_in(folder)))
    write_text(folder / JSON, report.model_dump_json(by_alias=True) + "\n")
    return left_out


def plots_in(folder: Path) -> list[tuple[str, str]]:
    """(file, what it shows) for each plot of a report."""
    return [(file, title) for file, title in FILES.items() if (folder / file).is_file()]


def copy(source: Path, target: Path) -> None:
    """Copy the files of a report, and nothing else, to another folder, which is made.

    The files of an older report are deleted first, and report.json comes last. Raises KarcherError
    if the target cannot be written to.
    """
    make_folder(target)
    for name in (JSON, MARKDOWN, HTML, *FILES):
        (target / name).unlink(missing_ok=True)
    for name in (*FILES, HTML, MARKDOWN, JSON):
        if (source / name).is_file():
            with replacing(target / name) as partial:
                shutil.copyfile(source / name, partial)


def read(folder: Path) -> Report:
    """The report in a folder; raises KarcherError if there is none that this version can read."""
    path = folder / JSON
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError:
        raise KarcherError(f"There is no report at {path}.") from None
    except ValidationError:
        raise KarcherError(
            f"{path} is not a report of the kind {SCHEMA}: write it again with this version of "
            "mergekit-karcher."
        ) from None
