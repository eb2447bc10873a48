"""`mergekit-karcher report`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from mergekit_karcher.cli.main import examples
from mergekit_karcher.host.measure import report_on
from mergekit_karcher.host.options import MergeOptions, ReadingCommand, add_merge_options
from mergekit_karcher.report.store import HTML, JSON, MARKDOWN, make_folder, plots_in, write
from mergekit_karcher.report.text import show


@click.command(
    "report",
    cls=ReadingCommand,
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
    help="Write report.json, report.md, report.html and plots to this folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
@add_merge_options  # type: ignore[untyped-decorator]
def main(config: Path, out: Path | None, as_json: bool, merge_options: MergeOptions) -> None:
    """Show the geometry of a config's models, without merging them.

    It tells how far apart the models are, how much length plain averaging would lose, in which
    modules the models disagree, and whether the choice of method matters at all. CONFIG is a config
    for mergekit-yaml or mergekit-pytorch, with any merge method. All weights are read once, in
    about 0.6 of the time that the merge takes, and in less memory.
    """
    merge_options.apply_global_options()
    if out is not None:
        make_folder(out)
    report = report_on(config, merge_options)
    if as_json:
        click.echo(report.model_dump_json(by_alias=True))
    else:
        show(report, Console())
    if out is None:
        return
    left_out = write(report, out)
    if not merge_options.quiet:
        files = [name for name in (JSON, MARKDOWN, HTML) if (out / name).is_file()]
        if plots := plots_in(out):
            files.append(f"{len(plots)} plots")
        click.echo(f"Wrote {', '.join(files[:-1])} and {files[-1]} to {out}.", err=True)
    for sentence in left_out:
        click.echo(sentence, err=True)
