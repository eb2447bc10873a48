"""`mergekit-karcher card`: the geometry in the model card, and no local path in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import yaml
from huggingface_hub import ModelCard

from mergekit_karcher.cli.main import examples, logged
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import write_text
from mergekit_karcher.host.documents import MODEL_KEYS, metrics_in, named_in, read_config
from mergekit_karcher.report.names import is_local, short_names
from mergekit_karcher.report.schema import Report
from mergekit_karcher.report.store import JSON, copy, plots_in, read
from mergekit_karcher.report.text import legend, markdown_table

GEOMETRY = "geometry"
_BEGIN, _END = "<!-- mergekit-karcher: geometry -->", "<!-- mergekit-karcher: end -->"
_CONFIG = "mergekit_config.yml"

# The fields of a config that may hold paths.
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
    help="The folder of the report on this merge.  [default: OUT/geometry]",
)
@logged
def main(out: Path, folder: Path | None, quiet: bool) -> None:
    """Add the geometry of a merge to its model card, and take local paths out of it.

    OUT is the folder that mergekit wrote. Its README.md gets a section with the verdict, the table
    and the plots of the report. In README.md and mergekit_config.yml, names take the place of local
    paths, and base_model lists only models that are on the Hub. Running it again changes nothing.
    """
    names = finish(out, folder)
    if not quiet:
        paths = "1 local path" if len(names) == 1 else f"{len(names)} local paths"
        click.echo(f"{out / 'README.md'}: geometry added, {paths} replaced by names.", err=True)


def finish(out: Path, folder: Path | None = None) -> dict[str, str]:
    """Finish the model card in a folder that mergekit wrote.

    Arguments:
        out: The folder.
        folder: Where the report is; it is copied into out. By default it is in out already.

    Returns:
        The name that each local path was replaced by.

    Raises:
        KarcherError: If the report, or a card with valid front matter, is not there, or if the
            report is on another merge.
    """
    report = _report_for(out, folder)
    readme, config = out / "README.md", out / _CONFIG
    card = _card(readme)
    names = _names(config, report) if config.is_file() else {}
    listed = card.data.base_model or []
    listed = [listed] if isinstance(listed, str) else listed
    kept = [model for model in listed if model not in names and not is_local(model)]
    hub_ids = [hub_id for model in report.models for hub_id in model.hub_ids]
    card.data.base_model = list(dict.fromkeys([*kept, *hub_ids])) or None
    body = _without_section(_renamed(card.text, names)).rstrip()
    card.text = f"{body}\n\n{_section(report, out / GEOMETRY)}\n"
    write_text(readme, str(card))
    if config.is_file():
        write_text(config, _renamed(config.read_text(encoding="utf-8"), names))
    return names


def _report_for(out: Path, folder: Path | None) -> Report:
    """The report on a merge, which is in its own folder from now on."""
    inside = out / GEOMETRY
    source = folder or inside
    if not (source / JSON).is_file():
        raise KarcherError(
            f"There is no report in {source}: merge with MERGEKIT_KARCHER_REPORT={inside} in the "
            f"environment (after mergekit-multi it is in {inside / out.name}: name that by "
            f"--report), or run mergekit-karcher report CONFIG --out {inside}."
        )
    report = read(source)
    if source.resolve() != inside.resolve():
        copy(source, inside)
    return report


def _card(readme: Path) -> Any:
    if not readme.is_file():
        raise KarcherError(
            f"{readme.parent} has no README.md to add to: merge without --no-write-model-card."
        )
    try:
        return ModelCard.load(readme)
    except (ValueError, yaml.YAMLError) as error:
        where = " ".join(str(error).split())
        raise KarcherError(f"The front matter of {readme} is not valid: {where}.") from None


def _section(report: Report, folder: Path) -> str:
    images = [f"![{title}]({GEOMETRY}/{file})" for file, title in plots_in(folder)]
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


def _names(config: Path, report: Report) -> dict[str, str]:
    """The name for every local path of a config; raises if the report is on another merge."""
    on_the_hub = {hub_id for model in report.models for hub_id in model.hub_ids}
    parts = {part for model in report.models for part in model.name.split("+")}
    of_paths = {re.split(r"[/\\]", part)[-1] for part in parts - on_the_hub}

    def local(path: str) -> bool:
        path = path.split("@")[0]
        # A path of two parts looks like a Hub id once the folder is gone.
        known = path not in on_the_hub and re.split(r"[/\\]", path.rstrip("/"))[-1] in of_paths
        return path not in on_the_hub and (is_local(path) or known)

    document = read_config(config)
    references = list(dict.fromkeys(named_in(document, _PATH_KEYS)))
    short = short_names(references, local)
    missing = {model.name for model in report.models} - set(short.values())
    if missing or document["merge_method"] != report.settings.merge_method:
        raise KarcherError(
            f"The report is not on the merge that {config} describes"
            f"{' (no model of it is ' + ' or '.join(sorted(missing)) + ')' if missing else ''}: "
            "write the report again."
        )
    metrics = list(metrics_in(document))
    names = {path: name for path, name in short_names(metrics, is_local).items() if path != name}
    for reference in references:
        pieces = zip(reference.split("+"), short[reference].split("+"), strict=True)
        names.update({path: name for path, name in pieces if path != name})
    return names


def _renamed(text: str, names: dict[str, str]) -> str:
    # The longest first: one path may be the beginning of another.
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(f"[{path}](https://huggingface.co/{path})", names[path])
        # Not where the path is only a part of a longer one.
        whole = rf"(?<![\w./-]){re.escape(path)}(?![\w./-])"
        text = re.sub(whole, lambda _, name=names[path]: name, text)  # type: ignore[misc]
    return text
