"""`mergekit-karcher report`."""

from __future__ import annotations

from pathlib import Path

import click
from mergekit.options import OPTION_CATEGORIES, MergeOptions, PrettyPrintHelp, add_merge_options
from rich.console import Console

from mergekit_karcher.cli.main import examples
from mergekit_karcher.host.measure import report_on
from mergekit_karcher.report.store import NO_PLOTS, make_folder, write
from mergekit_karcher.report.text import show

# Of mergekit's options, those that are about the output of a merge.
_NOT_OURS = {"Output Settings"}
_NOT_OURS_EITHER = ("async_write", "write_threads", "random_seed")

# Wide enough for the table, where there is no terminal whose width could be asked for.
_WIDTH = 120


@click.command(
    "report",
    cls=PrettyPrintHelp,
    epilog=examples(
        "mergekit-karcher report config.yml",
        "mergekit-karcher report config.yml --out geometry",
        "mergekit-karcher report config.yml --json | jq .verdict",
    ),
)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write report.json, report.md and plots there.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
@add_merge_options  # type: ignore[untyped-decorator]
def main(config: Path, out: Path | None, as_json: bool, merge_options: MergeOptions) -> None:
    """Show the geometry of the models of a config, without merging them.

    CONFIG is a config of mergekit-yaml or mergekit-pytorch, of any merge method. Reads all weights
    once: about 0.6 of the time of the merge, and less memory. How far the models are apart, what
    plain averaging would lose, which modules disagree, and whether the method matters at all.
    """
    merge_options.apply_global_options()
    if out is not None:
        make_folder(out)
    report = report_on(config, merge_options)
    if as_json:
        click.echo(report.model_dump_json(by_alias=True))
    else:
        console = Console()
        show(report, console if console.is_terminal else Console(width=_WIDTH))
    if out is not None and not write(report, out):
        click.echo(NO_PLOTS, err=True)


for parameter in main.params:
    category = OPTION_CATEGORIES.get(parameter.name or "")
    if isinstance(parameter, click.Option):
        parameter.hidden = category in _NOT_OURS or parameter.name in _NOT_OURS_EITHER
