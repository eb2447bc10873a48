"""`mergekit-karcher suggest`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from mergekit_karcher import __version__
from mergekit_karcher.cli.main import examples
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import write_text
from mergekit_karcher.host.measure import dtype_of, report_on_document
from mergekit_karcher.host.options import MergeOptions, ReadingCommand, add_merge_options
from mergekit_karcher.report.suggestion import Suggestion, suggestion_of
from mergekit_karcher.report.verdict import relations

_WIDTH = 96


@click.command(
    "suggest",
    cls=ReadingCommand,
    epilog=examples(
        "mergekit-karcher suggest first second --base base --out config.yml",
        "mergekit-karcher suggest first second third > config.yml",
    ),
)
@click.argument("models", nargs=-1, metavar="MODEL MODEL...")
@click.option("--base", metavar="MODEL", help="What the models were trained from.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the config to this file, which must not exist; otherwise it is printed.",
)
@add_merge_options  # type: ignore[untyped-decorator]
def main(
    models: Sequence[str], base: str | None, out: Path | None, merge_options: MergeOptions
) -> None:
    """Say how models relate, and write a config that suits them; no data is needed.

    All weights are read once, as `mergekit-karcher report` does. What suits them goes by what was
    best for models like these in docs/evidence.md; `mergekit-karcher compare` measures it on text.
    """
    merge_options.apply_global_options()
    if len(models) < 2:
        raise KarcherError("A merge needs two models or more: name them one after the other.")
    if out is not None and out.exists():
        raise KarcherError(f"{out} is there already: give another file, or delete it.")
    report = report_on_document(_measured(models, base), "the models", Path.cwd(), merge_options)
    suggestion = suggestion_of(report)
    said = [*relations(report), suggestion.sentence]
    click.echo("\n".join(textwrap.wrap(" ".join(said), _WIDTH)), err=True)
    text = _config(suggestion, said, models, base, dtype_of(models[0], merge_options))
    if out is None:
        click.echo(text, nl=False)
        return
    write_text(out, text)
    click.echo(f"Wrote {out}: mergekit-yaml {out} merged", err=True)


def _measured(models: Sequence[str], base: str | None) -> dict[str, Any]:
    """A config whose report shows the weights, and the changes from a base if there is one."""
    inputs = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    if base is None:
        return {"merge_method": "linear", "models": inputs}
    return {"merge_method": "task_arithmetic", "base_model": base, "models": inputs}


def _config(
    suggestion: Suggestion,
    said: Sequence[str],
    models: Sequence[str],
    base: str | None,
    dtype: str | None,
) -> str:
    """The config as a text, what was said of the models as its comments."""
    settings = dict(suggestion.settings)
    if suggestion.around_base:
        settings["base_model"] = base
    settings["models"] = [
        {"model": model, "parameters": suggestion.of_each.copy()} for model in models
    ]
    if dtype is not None and suggestion.around_base:
        # Differences from the base are longer in bits than either.
        settings |= {"dtype": "float32", "out_dtype": dtype}
    elif dtype is not None:
        settings["dtype"] = dtype
    comments = textwrap.wrap(" ".join(said), _WIDTH, initial_indent="# ", subsequent_indent="# ")
    head = f"# Suggested by mergekit-karcher {__version__}, from the weights alone."
    body = yaml.safe_dump(settings, sort_keys=False)
    return "\n".join([head, *comments, body])
