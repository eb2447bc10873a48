"""`mergekit-karcher card`: how a merge was made in its model card, and no local path in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import click
import yaml
from huggingface_hub import ModelCard

from mergekit_karcher.cli.main import examples, logged
from mergekit_karcher.compare.result import read as read_comparison
from mergekit_karcher.compare.words import markdown_table, sentences
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import write_text
from mergekit_karcher.host.documents import MODEL_KEYS, metrics_in, named_in, read_config
from mergekit_karcher.report.apart import plain_range
from mergekit_karcher.report.names import is_local, short_names
from mergekit_karcher.report.schema import Model, Report
from mergekit_karcher.report.store import JSON, copy, plots_in, read
from mergekit_karcher.report.text import legend, markdown_tables
from mergekit_karcher.report.verdict import relation

GEOMETRY = "geometry"
_BEGIN, _END = "<!-- mergekit-karcher: geometry -->", "<!-- mergekit-karcher: end -->"
_SECTION = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_CONFIG = "mergekit_config.yml"

# What the section on the merge goes before, in a card that mergekit wrote.
_DETAILS = re.compile(r"^## Merge Details$", re.MULTILINE)

# The fields of a config that may hold paths.
_PATH_KEYS = (*MODEL_KEYS, "path", "source", "tokenizer_source")

# What must be alike in a config that was compared and in that of the merge.
_OF_A_METHOD = ("merge_method", "parameters")

# mergekit-pytorch writes no card.
_NEW_CARD = """---
tags:
- mergekit
- merge
---
# {name}

This is a merge of pre-trained models made with [mergekit](https://github.com/arcee-ai/mergekit).
"""


class Finished(NamedTuple):
    """What was done to a model card: the name that each local path got, and whether it changed."""

    names: dict[str, str]
    changed: bool


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
@click.option(
    "--comparison",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="What mergekit-karcher compare wrote, if the config of this merge came of it.",
)
@logged
def main(out: Path, folder: Path | None, comparison: Path | None, quiet: bool) -> None:
    """Say in a model card how the merge was made, and take local paths out of it.

    OUT is the folder that mergekit wrote. Its README.md gets a section with how the models relate,
    their weights, the settings, how to load the result, and the geometry; after mergekit-pytorch,
    which writes no README.md, one is made. In README.md and mergekit_config.yml, names take the
    place of local paths, and base_model lists only models that are on the Hub. Running it again
    changes nothing.
    """
    done = finish(out, folder, comparison)
    if quiet:
        return
    count = len(done.names)
    paths = "1 local path" if count == 1 else f"{count} local paths"
    what = f"section on the merge written, {paths} replaced by names"
    what = what if done.changed else "nothing to change"
    click.echo(f"{out / 'README.md'}: {what}.", err=True)


def finish(out: Path, folder: Path | None = None, comparison: Path | None = None) -> Finished:
    """Finish the model card in a folder that mergekit wrote, or make one where there is none.

    Arguments:
        out: The folder.
        folder: Where the report is; it is copied into out. By default it is in out already.
        comparison: Where the comparison is that the config of the merge came of, if there is one.

    Raises:
        KarcherError: If there is no report, if it or the comparison is on another merge, or if the
            front matter of the card is not valid.
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
    compared = "" if comparison is None else _compared(config, comparison)
    card.text = _with_section(_renamed(card.text, names), _section(report, out, compared))
    changed = _rewritten(readme, str(card))
    if config.is_file():
        changed |= _rewritten(config, _renamed(config.read_text(encoding="utf-8"), names))
    return Finished(names, changed)


def _rewritten(path: Path, text: str) -> bool:
    """Write a text to a file; returns whether it is another one than before."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    write_text(path, text)
    return True


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
        return ModelCard(_NEW_CARD.format(name=readme.resolve().parent.name))
    try:
        return ModelCard.load(readme)
    except (ValueError, yaml.YAMLError) as error:
        where = " ".join(str(error).split())
        raise KarcherError(f"The front matter of {readme} is not valid: {where}.") from None


def _with_section(text: str, section: str) -> str:
    """A card with the section where it stands already, or else before the details of mergekit."""
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: section, text)
    if _DETAILS.search(text):
        return _DETAILS.sub(lambda found: f"{section}\n\n{found[0]}", text, count=1)
    return f"{text.rstrip()}\n\n{section}\n"


def _compared(config: Path, folder: Path) -> str:
    """What was compared, with which result, and on what."""
    comparison = read_comparison(folder)
    document = read_config(config) if config.is_file() else {}
    same = [
        merge
        for merge in comparison.merges
        if merge.config is not None
        and all(merge.config.get(key) == document.get(key) for key in _OF_A_METHOD)
    ]
    if not same:
        raise KarcherError(
            f"No merge of the comparison in {folder} has the method and the parameters of "
            f"{config}: merge by a config that was compared, such as its best.yml."
        )
    listed = "\n".join(f"- {sentence}" for sentence in sentences(comparison))
    return (
        f"### How the method was chosen\n\nThis merge is `{same[0].name}` of these, compared by "
        f"`mergekit-karcher compare`:\n\n{listed}\n\n{markdown_table(comparison)}"
    )


def _section(report: Report, out: Path, compared: str) -> str:
    images = [f"![{title}]({GEOMETRY}/{file})" for file, title in plots_in(out / GEOMETRY)]
    parts = [
        _BEGIN,
        "## About this merge",
        relation(report),
        _models_table(report),
        _settings_line(report),
        f"```python\n{_loading(out)}\n```",
        *([compared] if compared else []),
        "<details>\n<summary>Geometry of this merge</summary>",
        # What karcher would have made of the models is not what users of another merge ask.
        *([] if report.settings.as_karcher else [report.verdict]),
        markdown_tables(report),
        legend(report),
        *images,
        "</details>",
        _END,
    ]
    return "\n\n".join(parts)


def _models_table(report: Report) -> str:
    """The models and their weights, but for the weights of methods that are not ours."""
    as_karcher = report.settings.as_karcher
    lines = [["model", "weight"], ["---", "---:"]]
    for model in report.models:
        weight = "base" if model.weight_range is None else plain_range(model.weight_range)
        marked = " (base)" if as_karcher and model.is_base else ""
        lines.append([f"{_linked(model)}{marked}", weight])
    return "\n".join(f"| {' | '.join(line[:1] if as_karcher else line)} |" for line in lines)


def _linked(model: Model) -> str:
    """The name of a model, with a link where all of it is on the Hub."""
    on_the_hub = model.name in model.hub_ids
    return f"[{model.name}](https://huggingface.co/{model.name})" if on_the_hub else model.name


def _settings_line(report: Report) -> str:
    settings = report.settings
    names = () if settings.as_karcher else ("granularity", "origin", "magnitude")
    given = [(name, getattr(settings, name)) for name in names]
    words = [f"{name}: {' and '.join(values)}" for name, values in given if values]
    words += [f"dtype: {dtype}" for dtype in [settings.out_dtype or settings.dtype] if dtype]
    return f"Merged by `{settings.merge_method}`{' with ' if words else ''}{', '.join(words)}."


def _loading(out: Path) -> str:
    """Python that loads the merge: by transformers, or a raw checkpoint by safetensors."""
    name, config = out.resolve().name, out / "config.json"
    if not config.is_file():
        files = sorted(path.name for path in out.glob("*.safetensors"))
        lines = [f'weights |= load_file("{name}/{file}")' for file in files]
        return "\n".join(["from safetensors.torch import load_file", "", "weights = {}", *lines])
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or [""]
    causal = re.search(r"ForCausalLM$|LMHeadModel$", architectures[0])
    kind = "AutoModelForCausalLM" if causal else architectures[0] or "AutoModel"
    imported, lines = [kind], [f'model = {kind}.from_pretrained("{name}", dtype="auto")']
    if (out / "tokenizer_config.json").is_file():
        imported.append("AutoTokenizer")
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{name}")')
    return "\n".join([f"from transformers import {', '.join(imported)}", "", *lines])


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
