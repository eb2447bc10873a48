"""`mergekit-karcher card`: the geometry in the model card, and no local path in it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click
import yaml
from huggingface_hub import ModelCard

from mergekit_karcher.cli.main import examples, logged
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.documents import MODEL_KEYS, metrics_in, named_in, read_config
from mergekit_karcher.report.names import is_local, short_names
from mergekit_karcher.report.schema import Report
from mergekit_karcher.report.store import JSON, copy, plots_in, read
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
            f" in the environment (after mergekit-multi it is in {inside / out.name}: name that by "
            f"--report), or run mergekit-karcher report CONFIG --out {inside}."
        )
    report = read(folder or inside)
    if folder is not None and folder.resolve() != inside.resolve():
        copy(folder, inside)
    readme = out / "README.md"
    if not readme.is_file():
        raise KarcherError(
            f"{out} has no README.md to add to: merge without --no-write-model-card."
        )
    try:
        card = ModelCard.load(readme)
    except (ValueError, yaml.YAMLError) as error:
        where = " ".join(str(error).split())
        raise KarcherError(f"The front matter of {readme} is not valid: {where}.") from None
    config = out / _CONFIG
    names = _names(config, report) if config.is_file() else {}
    listed = card.data.base_model or []
    listed = [listed] if isinstance(listed, str) else listed
    kept = [own for own in listed if own not in names and not is_local(own)]
    hub_ids = [hub_id for model in report.models for hub_id in model.hub_ids]
    card.data.base_model = list(dict.fromkeys([*kept, *hub_ids])) or None
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


def _names(config: Path, report: Report) -> dict[str, str]:
    """What to put in the place of every local path of a config; raises if it is another merge's."""
    on_the_hub = {hub_id for model in report.models for hub_id in model.hub_ids}
    parts = {part for model in report.models for part in model.name.split("+")}
    of_paths = {re.split(r"[/\\]", part)[-1] for part in parts - on_the_hub}

    def local(path: str) -> bool:
        path = path.split("@")[0]
        # A path of two parts looks like a Hub id once it is not there any more.
        known = path not in on_the_hub and re.split(r"[/\\]", path.rstrip("/"))[-1] in of_paths
        return path not in on_the_hub and (is_local(path) or known)

    document = read_config(config)
    references = list(dict.fromkeys(named_in(document, _PATH_KEYS)))
    short = short_names(references, local)
    missing = {model.name for model in report.models} - set(short.values())
    if missing or document["merge_method"] != report.settings.merge_method:
        raise KarcherError(
            f"The report is not on the merge that {config} describes"
            f"{': that has no ' + ', '.join(sorted(missing)) if missing else ''}; write it anew."
        )
    metrics = list(metrics_in(document))
    names = {path: n for path, n in short_names(metrics, is_local).items() if path != n}
    for reference in references:
        pieces = zip(reference.split("+"), short[reference].split("+"), strict=True)
        names.update({path: name for path, name in pieces if path != name})
    return names


def _renamed(text: str, names: dict[str, str]) -> str:
    # The longest first: one path may be the beginning of another.
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(f"[{path}](https://huggingface.co/{path})", names[path])
        # Nothing that the path is only a part of.
        whole = rf"(?<![\w./-]){re.escape(path)}(?![\w./-])"
        text = re.sub(whole, lambda _, name=names[path]: name, text)  # type: ignore[misc]
    return text


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
