"""`mergekit-karcher align`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mergekit_karcher.align import alignment
from mergekit_karcher.align.checkpoint import Checkpoint
from mergekit_karcher.align.run import Aligned, Choices, align, config_of
from mergekit_karcher.cli.config import MODEL_KEYS, named_in, read_config
from mergekit_karcher.cli.main import examples, logged
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.fisher_method import IDENTITY
from mergekit_karcher.report.names import is_local, short_names

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(
    "align",
    epilog=examples(
        "mergekit-karcher align run1 run2 run3 --out aligned",
        "mergekit-yaml aligned/config.yml merged",
        "mergekit-karcher align --config config.yml --out aligned --dry-run",
        "mergekit-karcher align a.safetensors b.safetensors c.safetensors --out aligned",
    ),
)
@click.argument("models", nargs=-1)
@click.option("--config", type=_FILE, help="Align the models of a mergekit config instead.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Where aligned models, config.yml and alignment.json go.",
)
@click.option(
    "--reference",
    help="Match all others to this model.  [default: the first of two; more are matched jointly]",
)
@click.option("--spec", type=_FILE, help="A specification of the symmetries, in YAML.")
@click.option("--residual", is_flag=True, help="Permute the residual stream as well.")
@click.option("--pad", is_flag=True, help="Fill narrower MLPs up with neurons that do nothing.")
@click.option(
    "--alignment", "known", type=_FILE, help="Apply the orders of an alignment.json again."
)
@click.option(
    "--starts",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="How often to begin anew where symmetries hang together.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--dry-run", is_flag=True, help="Show what would change, and write nothing.")
@click.option("--transformers-cache", help="Where models from the Hub are kept.")
@logged
def main(
    models: tuple[str, ...],
    config: Path | None,
    out: Path,
    reference: str | None,
    spec: Path | None,
    residual: bool,
    pad: bool,
    known: Path | None,
    starts: int,
    seed: int,
    dry_run: bool,
    transformers_cache: str | None,
    quiet: bool,
) -> None:
    """Reorder the neurons and heads of models so that they can be averaged.

    Networks that were trained from different initialisations compute alike with their neurons in
    another order. MODEL is a Hugging Face model, or a raw checkpoint of a plain stack of layers.
    Every aligned model computes what it did before, to within rounding: only the order changes.
    """
    if bool(models) == (config is not None):
        raise click.UsageError("Give either models or --config.")
    document = read_config(config) if config is not None else None
    references = list(models) if document is None else [*dict.fromkeys(named_in(document))]
    if len(references) < 2:
        raise click.UsageError("Give at least two models.")
    places = [os.path.realpath(r) if os.path.exists(r) else r for r in references]
    if len(set(places)) < len(places):
        raise click.UsageError("Give each model once.")
    if spec is not None and pad:
        raise click.UsageError("--pad needs to know more of a network than --spec says.")
    anchor = reference if reference is not None else (document or {}).get("base_model")
    if anchor is None and len(references) == 2:
        anchor = references[0]
    if anchor is not None and anchor not in references:
        raise click.UsageError(f"--reference {anchor} is not among the models.")
    names = _folder_names(references)
    checkpoints = [
        Checkpoint(model, name, transformers_cache)
        for model, name in zip(references, names, strict=True)
    ]
    if not dry_run:
        targets = [checkpoint.target(out) for checkpoint in checkpoints]
        for target in (*targets, out / "config.yml", out / "alignment.json"):
            if target.exists():
                raise KarcherError(f"{target} exists: name a new folder by --out.")
    choices = Choices(
        None if anchor is None else references.index(anchor), spec, residual, pad, starts, seed
    )
    bar = tqdm(
        desc="Aligning", disable=quiet, bar_format="{desc}: {n_fmt} done, {elapsed}{postfix}"
    )

    def advance(what: str) -> None:
        bar.set_postfix_str(what)
        bar.update()

    with bar:
        done = align(checkpoints, choices, alignment.read(known) if known else None, advance)
    if not dry_run:
        _write(done, out, document, references)
    if not quiet:
        _show(done, out, dry_run)


def _write(
    done: Aligned, out: Path, document: dict[str, Any] | None, references: Sequence[str]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    written = done.write(out)
    merged = config_of(done.checkpoints, written)
    if document is not None:

        @cache
        def carry(model: str, metric: str) -> str:
            index = references.index(model)
            if metric == IDENTITY or not (done.orders[index] or done.paddings[index].added):
                return metric
            name = f"{done.checkpoints[index].name}-metric"
            others = len([*out.glob(f"{name}*")])
            own = Checkpoint(metric, f"{name}-{others + 1}" if others else name)
            return str(done.carry(index, own, out).resolve())

        carried = _with_metrics(document, carry)
        merged = _replaced(carried, dict(zip(references, written, strict=True)))
    alignment.write(done.alignment, out / "alignment.json")
    # Last, so that a folder that has it is whole.
    partial = out / "config.yml.partial"
    partial.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
    os.replace(partial, out / "config.yml")


def _show(done: Aligned, out: Path, dry_run: bool) -> None:
    console = Console(soft_wrap=True)
    table = Table(title="Units that moved")
    for title in ("symmetry", "how many", "units", "moved, %"):
        table.add_column(title, justify="left" if title == "symmetry" else "right")
    shares = done.moved()
    kinds: dict[str, list[Any]] = {}
    for symmetry in done.specification.symmetries:
        kinds.setdefault(re.sub(r"\d+", "#", symmetry.name), []).append(symmetry)
    for kind, symmetries in kinds.items():
        moved = [shares[symmetry.name] for symmetry in symmetries]
        sizes = sorted({symmetry.size for symmetry in symmetries})
        size = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        table.add_row(kind, str(len(symmetries)), size, f"{100 * sum(moved) / len(moved):.3g}")
    console.print(table)
    before, after = done.before, done.after
    console.print(
        f"Largest angle between two models: {_degrees(before.angles.max())} degrees before, "
        f"{_degrees(after.angles.max())} after; spread around their Karcher mean: "
        f"{_degrees(before.spread)} before, {_degrees(after.spread)} after.",
        highlight=False,
    )
    if not done.changed:
        console.print("The models are aligned already: there is nothing to do.")
    elif dry_run:
        console.print("Nothing was written (--dry-run).")
    if not dry_run:
        console.print(f"Merge them by: {_merge_command(done)} {out / 'config.yml'} MERGED")


def _merge_command(done: Aligned) -> str:
    return "mergekit-pytorch" if done.checkpoints[0].is_raw else "mergekit-yaml"


def _degrees(angle: float) -> str:
    # Angles from inner products are right to a millionth of a degree or so.
    return f"{round(math.degrees(angle), 5):.3g}"


def _folder_names(references: Sequence[str]) -> list[str]:
    short = short_names(references, is_local)
    names = [re.sub(r"[/\\@]", "--", short[reference]) for reference in references]
    stems = [
        name.removesuffix(Path(reference).suffix) if Path(reference).is_file() else name
        for name, reference in zip(names, references, strict=True)
    ]
    # The same name with two endings would be one name.
    return stems if len(set(stems)) == len(stems) else names


def _replaced(part: Any, places: dict[str, str]) -> Any:
    """A config with the models in other places; words such as base may be names of models, too."""
    if isinstance(part, list):
        return [_replaced(item, places) for item in part]
    if not isinstance(part, dict):
        return part
    return {
        key: places.get(value, value)
        if isinstance(value, str) and (key in MODEL_KEYS or _is_source(key, value))
        else _replaced(value, places)
        for key, value in part.items()
    }


def _with_metrics(part: Any, carry: Callable[[str, str], str]) -> Any:
    """A config with other metrics; carry: from a model and its metric to the new one."""
    if isinstance(part, list):
        return [_with_metrics(item, carry) for item in part]
    if not isinstance(part, dict):
        return part

    def changed(setting: Any) -> Any:
        if isinstance(setting, list):
            return [changed(item) for item in setting]
        if isinstance(setting, dict):
            return {**setting, "value": changed(setting["value"])}
        return carry(part["model"], setting)

    result = {key: _with_metrics(value, carry) for key, value in part.items()}
    parameters = part.get("parameters") or {}
    if isinstance(part.get("model"), str) and "metric" in parameters:
        result["parameters"] = {**parameters, "metric": changed(parameters["metric"])}
    return result


def _is_source(key: str, value: str) -> bool:
    return key in ("tokenizer_source", "source") and value not in ("base", "union")
