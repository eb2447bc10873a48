"""The folder that a report is written to, and read from."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from pydantic import ValidationError

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.report.plots import TITLES, draw
from mergekit_karcher.report.schema import SCHEMA, Report
from mergekit_karcher.report.text import markdown

_LOG = logging.getLogger(__name__)

JSON, MARKDOWN = "report.json", "report.md"
NO_PLOTS = (
    "The report has no plots, because matplotlib is not installed: "
    "pip install 'mergekit-karcher[report]' adds them."
)


def make_folder(folder: Path) -> None:
    """Make the folder of a report before the work that fills it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise KarcherError(
            f"The report cannot be written to {folder} ({error.strerror}): name another folder."
        ) from None


def write(report: Report, folder: Path) -> bool:
    """Write the plots, report.md, and last report.json, so that what has that is whole.

    Returns whether there are plots: there are none where matplotlib is not installed.
    """
    for old in (JSON, *TITLES):
        (folder / old).unlink(missing_ok=True)
    try:
        draw(report, folder)
    except ImportError:
        _LOG.debug("no plots", exc_info=True)
    plots = plots_in(folder)
    (folder / MARKDOWN).write_text(markdown(report, plots), encoding="utf-8")
    partial = folder / f"{JSON}.partial"
    partial.write_text(report.model_dump_json(by_alias=True) + "\n", encoding="utf-8")
    os.replace(partial, folder / JSON)
    return bool(plots)


def plots_in(folder: Path) -> list[tuple[str, str]]:
    """(file, what it shows) for each plot of a report."""
    return [(file, title) for file, title in TITLES.items() if (folder / file).is_file()]


def copy(source: Path, target: Path) -> None:
    """The files of a report, and no other, in the place of those of an older one."""
    make_folder(target)
    for name in (JSON, MARKDOWN, *TITLES):
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def read(folder: Path) -> Report:
    """The report in a folder; raises `KarcherError` where there is none that this version reads."""
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
