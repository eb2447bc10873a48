"""The merges of a config, one after the other: one, or the stages of mergekit-multi."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.stages import Stage, read_stages
from mergekit_karcher.runner.driver import Settings, merge
from mergekit_karcher.runner.output import is_finished


def merge_all(
    path: Path, out: Path, intermediate: Path | None, options: Any, settings: Settings
) -> None:
    """Do every merge of a config, each after those that it takes models from.

    Arguments:
        path: A config of mergekit-yaml or mergekit-multi.
        out: Where the merge without a name goes.
        intermediate: Where those with a name go; needed if there are any.
        options: mergekit's `MergeOptions`.
        settings: How each is done.

    Raises:
        KarcherError: For what the user can mend.
    """
    if not options.safe_serialization:
        raise KarcherError(
            "mergekit-karcher merge writes safetensors only: leave --no-safe-serialization out, or "
            "use mergekit-yaml."
        )
    stages = read_stages(path, intermediate)
    for stage in stages:
        place = out if stage.name is None else _place(stage, intermediate)
        if stage.name is not None and is_finished(place):
            if not settings.quiet:
                click.echo(f"{place} is whole, and is not merged again.", err=True)
            continue
        merge(stage.source, place, options, settings)


def _place(stage: Stage, intermediate: Path | None) -> Path:
    if intermediate is None or stage.name is None:
        raise KarcherError(
            f"The config names a stage {stage.name}: say with --intermediate-dir where it goes."
        )
    return intermediate / stage.name
