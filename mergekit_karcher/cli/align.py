"""`mergekit-karcher align`."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mergekit_karcher.align import output
from mergekit_karcher.align.checkpoint import Checkpoint
from mergekit_karcher.align.run import Aligned, Choices, align
from mergekit_karcher.align.symmetry import Symmetry
from mergekit_karcher.cli.main import examples, logged
from mergekit_karcher.host.documents import named_in, read_config
from mergekit_karcher.host.places import check_places
from mergekit_karcher.report.names import is_local, short_names

# Seconds in which no progress is shown: errors before the work begins need none.
_DELAY = 0.5
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(
    "align",
    epilog=examples(
        "mergekit-karcher align run1 run2 run3 --out aligned",
        "mergekit-yaml aligned/config.yml merged",
        "mergekit-karcher align --config config.yml --dry-run",
        "mergekit-karcher align a.pt b.pt c.pt --assume-stack --out aligned",
    ),
)
@click.argument("models", nargs=-1)
@click.option("--config", type=_FILE, help="Align the models of this mergekit config instead.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="A new folder for the aligned models, config.yml and alignment.json.",
)
@click.option(
    "--reference",
    help="Match all other models to this one.  [default: the base_model of a config, or the first "
    "of two models; otherwise all are matched to each other]",
)
@click.option("--spec", type=_FILE, help="A YAML file that says what may be permuted.")
@click.option(
    "--assume-stack",
    is_flag=True,
    help="Files of tensors are plain stacks: each layer reads the one before it, and nothing else.",
)
@click.option("--residual", is_flag=True, help="Permute the residual stream as well.")
@click.option("--pad", is_flag=True, help="Fill narrower MLPs up with neurons that do nothing.")
@click.option("--alignment", type=_FILE, help="Apply the orders of an earlier alignment.json.")
@click.option(
    "--starts",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="How many starting points to try for orders that depend on each other; the best is kept.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="The same seed gives the same orders."
)
@click.option("--dry-run", is_flag=True, help="Show what would change, and write nothing.")
@click.option("--transformers-cache", help="Where models from the Hub are kept.")
@logged
def main(
    models: tuple[str, ...],
    config: Path | None,
    out: Path | None,
    reference: str | None,
    dry_run: bool,
    transformers_cache: str | None,
    quiet: bool,
    **choices: Any,
) -> None:
    """Reorder the neurons and heads of models so that they can be averaged.

    The neurons of a layer can stand in any order without changing what the network computes, so
    networks that were trained from different initialisations have theirs in different orders, and
    averaging pairs neurons that have nothing to do with each other. This command finds the orders
    that bring the MODELS nearest to each other, and writes the models in these orders. Each of them
    computes what it did before, to within rounding.

    A model is a Hugging Face model, or a file of tensors. Such a file does not say how its layers
    are connected: add --assume-stack if they are a plain stack, or describe them by --spec.
    """
    if bool(models) == (config is not None):
        raise click.UsageError("Give either models or --config.")
    if out is None and not dry_run:
        raise click.UsageError("Give --out, or --dry-run to write nothing.")
    document = None if config is None else read_config(config)
    references = list(models) if document is None else [*dict.fromkeys(named_in(document))]
    if config is not None:
        expanded = map(os.path.expanduser, references)
        check_places(expanded, folder=config.parent, cache=transformers_cache)
    if len(references) < 2:
        raise click.UsageError("Give at least two models.")
    places = {os.path.realpath(os.path.expanduser(r)) for r in references}
    if len(places) < len(references):
        raise click.UsageError("Give each model once.")
    if choices["spec"] is not None and choices["pad"]:
        raise click.UsageError("--pad needs to know more of a network than --spec says.")
    checkpoints = [
        Checkpoint(model, name, transformers_cache)
        for model, name in zip(references, _folder_names(references), strict=True)
    ]
    if out is not None and not dry_run:
        output.check_free(checkpoints, out)
    chosen = Choices(_chosen_reference(reference, references, document), **choices)
    aligned = _align(checkpoints, chosen, quiet)
    if not quiet:
        _show(aligned)
    if out is None or dry_run:
        text = "Nothing was written (--dry-run)."
    else:
        output.write(aligned, out, document, transformers_cache)
        text = _next_step(aligned, out)
    if not quiet:
        click.echo(text)


def _chosen_reference(
    reference: str | None, references: Sequence[str], document: dict[str, Any] | None
) -> str | None:
    """The model that all others are matched to; None if they are matched jointly."""
    if reference is None:
        reference = (document or {}).get("base_model")
    if reference is None and len(references) == 2:
        return references[0]
    if reference is not None and reference not in references:
        raise click.UsageError(f"--reference {reference} is not among the models.")
    return reference


def _folder_names(references: Sequence[str]) -> list[str]:
    short = short_names(references, is_local)
    names = [re.sub(r"[/\\@+\s\"]", "--", short[reference]) for reference in references]
    paths = [Path(reference).expanduser() for reference in references]
    suffixes = [path.suffix if path.is_file() else "" for path in paths]
    stems = [name.removesuffix(end) for name, end in zip(names, suffixes, strict=True)]
    # The same name with two endings would be one name.
    return stems if len(set(stems)) == len(stems) else names


def _align(checkpoints: Sequence[Checkpoint], choices: Choices, quiet: bool) -> Aligned:
    form = "{desc}: {n_fmt} of {total_fmt} done in {elapsed}, about {remaining} left{postfix}"
    with tqdm(desc="Aligning", disable=quiet, bar_format=form, delay=_DELAY) as bar:
        begun = 0

        def advance(what: str) -> None:
            nonlocal begun
            # A step is done once the next one begins.
            bar.update(begun - bar.n)
            bar.set_postfix_str(what)
            begun += 1

        aligned = align(checkpoints, choices, bar.reset, advance)
        bar.update()
        return aligned


def _show(aligned: Aligned) -> None:
    console = Console(soft_wrap=True)
    console.print(_table_of_moves(aligned))
    before, after = aligned.before, aligned.after
    console.print(
        f"Largest angle between two models: {_degrees(before.angles.max())} degrees before, "
        f"{_degrees(after.angles.max())} after; spread around their Karcher mean: "
        f"{_degrees(before.spread)} before, {_degrees(after.spread)} after.",
        highlight=False,
    )
    if not aligned.changed:
        console.print("The models are aligned already: there is nothing to do.")


def _next_step(aligned: Aligned, out: Path) -> str:
    """What the user does next, as commands to be pasted."""
    first = aligned.models[0].checkpoint
    raw = output.merges_raw(first)
    tool = "mergekit-pytorch" if raw else "mergekit-yaml"
    text = f"Merge them by: {shlex.join([tool, str(out / output.CONFIG), 'MERGED'])}"
    if raw and first.config is not None:
        text += (
            f"\nmergekit-yaml stops on models of the type {first.config.get('model_type')}, and "
            "mergekit-pytorch writes weights alone: then copy config.json and the tokenizer's "
            f"files from {shlex.quote(str(first.target(out) if aligned.changed else first.place))}"
            " into MERGED."
        )
    return text


def _table_of_moves(aligned: Aligned) -> Table:
    """The share of units that moved, the layers of one kind in one line."""
    table = Table(title="Units that moved")
    for title in ("symmetry", "how many", "units", "moved, %"):
        table.add_column(title, justify="left" if title == "symmetry" else "right")
    shares = aligned.moved_shares()
    kinds: dict[str, list[Symmetry]] = {}
    for symmetry in aligned.specification.symmetries:
        kinds.setdefault(re.sub(r"\d+", "#", symmetry.name), []).append(symmetry)
    for kind, symmetries in kinds.items():
        moved = [shares[symmetry.name] for symmetry in symmetries]
        sizes = sorted({symmetry.size for symmetry in symmetries})
        units = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        table.add_row(kind, str(len(symmetries)), units, f"{100 * sum(moved) / len(moved):.3g}")
    return table


def _degrees(angle: float) -> str:
    # Angles from inner products are right to a millionth of a degree or so.
    return f"{round(math.degrees(angle), 5):.3g}"
