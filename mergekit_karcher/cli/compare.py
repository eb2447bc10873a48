"""`mergekit-karcher compare`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from mergekit_karcher.cli.main import examples
from mergekit_karcher.compare.run import Request, compare
from mergekit_karcher.compare.store import BEST, write
from mergekit_karcher.compare.words import show
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.options import MergeOptions, ReadingCommand, add_merge_options
from mergekit_karcher.metrics.examples import Source

_CONFIG = (".yml", ".yaml")


@click.command(
    "compare",
    cls=ReadingCommand,
    epilog=examples(
        "mergekit-karcher compare --base ./base ./code ./maths --data code=code.txt \\",
        "    --data maths=maths.txt --out comparison",
        "mergekit-karcher compare --base ./base ./code ./maths --data text.txt --tune",
        "mergekit-karcher compare linear.yml ties.yml mine.yml --data text.txt",
        "mergekit-yaml comparison/best.yml merged",
    ),
)
@click.argument("what", nargs=-1, required=True, metavar="MODEL... | CONFIG...")
@click.option("--base", help="What the models were fine-tuned from.")
@click.option(
    "--data",
    multiple=True,
    metavar="NAME=FILE",
    help="A text that the models were not trained on, once for each kind: a text, a file of "
    "records (.jsonl, .json, .csv, .parquet), or a dataset. For classifiers, records.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="comparison",
    show_default=True,
    help="Where the result goes. The same command again goes on with an interrupted run.",
)
@click.option(
    "--windows",
    type=click.IntRange(2),
    default=16,
    show_default=True,
    help="Windows of each text to choose by, and as many others to report by.",
)
@click.option(
    "--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a window."
)
@click.option(
    "--budget",
    type=click.FloatRange(0, min_open=True),
    metavar="MINUTES",
    help="Start no merge that would end later. Those that gained most elsewhere come first.",
)
@click.option(
    "--tune",
    is_flag=True,
    help="Search for the numbers of each merge, such as its length or ridge, and for the weights "
    "of the best one, on the windows to choose by.",
)
@click.option(
    "--tune-kinds",
    "a_kind",
    is_flag=True,
    help="As --tune, and search for one length of attention, one of the MLPs and one of the rest.",
)
@click.option("--subset", help="The configuration of a dataset.")
@click.option("--split", default="train", show_default=True, help="The split of a dataset.")
@click.option(
    "--text", multiple=True, default=["text"], show_default=True, help="The column of a text."
)
@click.option("--label", default="label", show_default=True, help="The column of a class.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@add_merge_options  # type: ignore[untyped-decorator]
def main(
    what: tuple[str, ...],
    base: str | None,
    data: tuple[str, ...],
    out: Path,
    windows: int,
    budget: float | None,
    tune: bool,
    a_kind: bool,
    merge_options: MergeOptions,
    **source: object,
) -> None:
    """Find out by which method models are merged best, on a little of your text.

    Fine-tunes of a base are merged by several methods, one after the other, and each merge is
    judged beside the models: by bits per byte on text, or by its errors on records with classes.
    In place of the models, give configs of mergekit to compare those. The result is a table, and
    best.yml in OUT, ready for mergekit-yaml.
    """
    merge_options.apply_global_options()
    are_configs = [name.endswith(_CONFIG) for name in what]
    if any(are_configs) and (base is not None or not all(are_configs)):
        raise click.UsageError("Give configs alone, or models and their --base.")
    for name in what if any(are_configs) else ():
        if not Path(name).is_file():
            raise click.UsageError(f"There is no file {name}.")
    # transformers shows a bar for every model that it loads, and warns of mergekit's words.
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not merge_options.verbosity:
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    request = Request(
        base=base,
        models=() if any(are_configs) else what,
        configs=[Path(name) for name in what] if any(are_configs) else (),
        data=data,
        source=Source(data="", most=0, **source),  # type: ignore[arg-type]
        windows=windows,
        out=out,
        budget=budget,
        tune=tune or a_kind,
        a_kind=a_kind,
        quiet=merge_options.quiet,
    )
    try:
        comparison, chosen = compare(request, merge_options)
    except KeyboardInterrupt:
        raise KarcherError(
            f"Stopped; what is done is kept in {out}: run the same command again to go on."
        ) from None
    has_chart = write(comparison, chosen, out)
    if merge_options.quiet:
        return
    show(comparison, Console())
    chart = "" if has_chart else " (no chart: pip install 'mergekit-karcher[report]' draws one)"
    click.echo(f"Wrote the comparison to {out}{chart}; merge by: mergekit-yaml {out / BEST} merged")
