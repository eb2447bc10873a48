"""`mergekit-karcher card`: the geometry in the model card, and no local path in it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import click
import yaml
from huggingface_hub import ModelCard

from mergekit_karcher.cli.config import MODEL_KEYS, named_in
from mergekit_karcher.cli.main import examples, logged
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.report.files import JSON, plots_in, read
from mergekit_karcher.report.names import short_names
from mergekit_karcher.report.schema import Report
from mergekit_karcher.report.text import legend, markdown_table

GEOMETRY = "geometry"
_BEGIN, _END = "<!-- mergekit-karcher: geometry -->", "<!-- mergekit-karcher: end -->"
_CONFIG = "mergekit_config.yml"

# The fields of a config in which paths stand.
_PATH_KEYS = (*MODEL_KEYS, "path", "source", "tokenizer_source")


@click.command(
    "card",
    epilog=examples(
        "MERGEKIT_KARCHER_REPORT=merged/geometry mergekit-yaml config.yml merged",
        "mergekit-karcher card merged",
        "hf upload me/merged merged",
    ),
)
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--report",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the report on this merge is.  [default: OUT/geometry]",
)
@logged
def main(out: Path, folder: Path | None, quiet: bool) -> None:
    """Add the geometry of a merge to its model card, and take local paths out of it.

    OUT is the folder that mergekit wrote. Its README.md gets a section with the verdict, the table
    and the plots; in it and in mergekit_config.yml local paths become names; base_model lists what
    is on the Hub, and nothing else. Run twice, it changes nothing more.
    """
    replaced = finish(out, folder)
    if not quiet:
        paths = "1 local path" if len(replaced) == 1 else f"{len(replaced)} local paths"
        click.echo(f"{out / 'README.md'}: geometry added, {paths} replaced by names.", err=True)


def finish(out: Path, folder: Path | None = None) -> dict[str, str]:
    """Finish the card in a folder of mergekit's; returns the names that local paths got."""
    inside = out / GEOMETRY
    if not (folder or inside).joinpath(JSON).is_file():
        raise KarcherError(
            f"There is no report in {folder or inside}: merge with MERGEKIT_KARCHER_REPORT={inside}"
            f" in the environment, or run mergekit-karcher report CONFIG --out {inside}."
        )
    report = read(folder or inside)
    if folder is not None and folder.resolve() != inside.resolve():
        shutil.copytree(folder, inside, dirs_exist_ok=True)
    readme = out / "README.md"
    if not readme.is_file():
        raise KarcherError(
            f"{out} has no README.md to add to: merge without --no-write-model-card."
        )
    try:
        card = ModelCard.load(readme)
    except ValueError as error:
        raise KarcherError(f"The front matter of {readme} is not valid: {error}") from None
    config = out / _CONFIG
    names = _names(config.read_text(encoding="utf-8"), report) if config.is_file() else {}
    hub_ids = [hub_id for model in report.models for hub_id in model.hub_ids]
    card.data.base_model = list(dict.fromkeys(hub_ids)) or None
    body = _without_section(_renamed(card.text, names)).rstrip()
    card.text = f"{body}\n\n{_section(report, inside)}\n"
    _write(readme, str(card))
    if config.is_file():
        _write(config, _renamed(config.read_text(encoding="utf-8"), names))
    return names


def _section(report: Report, folder: Path) -> str:
    images = [f"![{shows}]({GEOMETRY}/{file})" for file, shows in plots_in(folder)]
    parts = [
        _BEGIN,
        "## Geometry of this merge",
        report.verdict,
        markdown_table(report),
        legend(report),
        *images,
        _END,
    ]
    return "\n\n".join(parts)


def _without_section(text: str) -> str:
    return re.sub(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", "", text, flags=re.DOTALL)


def _names(config: str, report: Report) -> dict[str, str]:
    """What to put in the place of every local path of a config."""
    on_the_hub = {hub_id for model in report.models for hub_id in model.hub_ids}

    def is_local(path: str) -> bool:
        return os.sep in path and path.split("@")[0] not in on_the_hub

    try:
        documents = list(yaml.safe_load_all(config))
    except yaml.YAMLError:
        return {}
    references = list(dict.fromkeys(named_in(documents, _PATH_KEYS)))
    short = short_names(references, is_local)
    names = {}
    for reference in references:
        pieces = zip(reference.split("+"), short[reference].split("+"), strict=True)
        names.update({path: name for path, name in pieces if path != name})
    return names


def _renamed(text: str, names: dict[str, str]) -> str:
    # The longest first: one path may be the beginning of another.
    for path in sorted(names, key=len, reverse=True):
        link = f"[{path}](https://huggingface.co/{path})"
        text = text.replace(link, names[path]).replace(path, names[path])
    return text


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
