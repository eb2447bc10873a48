"""`mergekit-karcher merge`."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from mergekit_karcher.cli.main import examples
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.options import MergeOptions, PrettyPrintHelp, add_merge_options
from mergekit_karcher.runner.driver import Settings
from mergekit_karcher.runner.stages import merge_all


class Stopped(KarcherError):
    """The merge was stopped by a signal."""

    def __init__(self, out: Path) -> None:
        super().__init__(
            f"Stopped; what is done is kept in {out}: run the same command again to go on."
        )


@click.command(
    "merge",
    cls=PrettyPrintHelp,
    epilog=examples(
        "mergekit-karcher merge config.yml merged",
        "mergekit-karcher merge config.yml merged --dry-run",
        "mergekit-karcher merge config.yml merged --out-shard-size 2B --workers 4",
        "mergekit-karcher merge stages.yml merged --intermediate-dir stages",
        "mergekit-karcher merge config.yml /shared/merged --ray auto",
    ),
)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes of this machine  [default: what its cores and memory allow]",
)
@click.option("--ray", metavar="ADDRESS", help="Merge on a Ray cluster; auto for the one here.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, and stop.")
@click.option("--overwrite", is_flag=True, help="Replace the model that is in OUT.")
@click.option(
    "--intermediate-dir",
    "-I",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the named stages of a config of mergekit-multi go.",
)
@click.option("--json-progress", is_flag=True, help="Show progress as lines of JSON.")
@add_merge_options  # type: ignore[untyped-decorator]
def main(
    config: Path,
    out: Path,
    workers: int | None,
    ray: str | None,
    dry_run: bool,
    overwrite: bool,
    intermediate_dir: Path | None,
    json_progress: bool,
    merge_options: MergeOptions,
) -> None:
    """Merge models as mergekit-yaml does, in several processes, and so that nothing is lost.

    The result has the same tensors. It is merged shard by shard in OUT/.merge: the same command
    goes on where the first was stopped, whatever stopped it, and OUT holds a model only when all of
    it is there. CONFIG is a config for mergekit-yaml or mergekit-multi, with any merge method.
    """
    merge_options.apply_global_options()
    settings = Settings(
        workers, ray, overwrite, as_json=json_progress, quiet=merge_options.quiet, dry_run=dry_run
    )

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        merge_all(config, out, intermediate_dir, merge_options, settings)
    except KeyboardInterrupt:
        raise Stopped(out) from None
    finally:
        signal.signal(signal.SIGTERM, before)
