"""The folder that a report is written to, and read from."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from pydantic import ValidationError

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import replacing, write_text
from mergekit_karcher.report.plots import FILES, draw
from mergekit_karcher.report.schema import SCHEMA, Report
from mergekit_karcher.report.text import markdown

_LOG = logging.getLogger(__name__)

JSON, MARKDOWN = "report.json", "report.md"
NO_PLOTS = (
    "The report has no plots, because matplotlib is not installed: "
    "pip install 'mergekit-karcher[report]' adds them."
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


def write(report: Report, folder: Path) -> bool:
    """Write a report to a folder, which must exist; returns whether matplotlib is there for plots.

    The files of an older report are deleted first, and report.json comes last: a folder that has it
    is complete. Raises OSError if a file cannot be written.
    """
    for old in (JSON, *FILES):
        (folder / old).unlink(missing_ok=True)
    try:
        draw(report, folder)
    except ImportError:
        _LOG.debug("no plots", exc_info=True)
    plots = plots_in(folder)
    write_text(folder / MARKDOWN, markdown(report, plots))
    write_text(folder / JSON, report.model_dump_json(by_alias=True) + "\n")
    return bool(plots)


def plots_in(folder: Path) -> list[tuple[str, str]]:
    """(file, what it shows) for each plot of a report."""
    return [(file, title) for file, title in FILES.items() if (folder / file).is_file()]


def copy(source: Path, target: Path) -> None:
    """Copy the files of a report, and nothing else, to another folder, which is made.

    The files of an older report are deleted first, and report.json comes last. Raises KarcherError
    if the target cannot be written to.
    """
    make_folder(target)
    for name in (JSON, MARKDOWN, *FILES):
        (target / name).unlink(missing_ok=True)
    for name in (*FILES, MARKDOWN, JSON):
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
