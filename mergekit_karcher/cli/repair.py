"""`mergekit-karcher repair`."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from mergekit_karcher.align.repair_checkpoint import repair_checkpoint
from mergekit_karcher.cli.main import examples, logged


@click.command(
    "repair",
    epilog=examples(
        "mergekit-karcher align run1 run2 --out aligned",
        "mergekit-yaml aligned/config.yml merged",
        "mergekit-karcher repair merged aligned/run1 aligned/run2 --data text.txt --out repaired",
    ),
)
@click.argument("merged")
@click.argument("parents", nargs=-1, required=True)
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="Calibration data: a text, or for a raw network a file with one tensor of inputs.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Where to write the repaired model.",
)
@click.option(
    "--assume-stack",
    is_flag=True,
    help="Files of tensors are plain stacks of linear layers with ReLU between them.",
)
@logged
def main(
    merged: str,
    parents: tuple[str, ...],
    data: Path,
    out: Path,
    assume_stack: bool,
    quiet: bool,
) -> None:
    """Rescale the hidden units of a merged network to match its parents (REPAIR).

    MERGED is the merge of the aligned PARENTS. Averaging makes activations weaker. Every hidden
    unit is scaled, and shifted where its layer has a bias, until the mean and the standard
    deviation of its pre-activation on the calibration data are the average of the parents'.

    The data is a text, of which up to 4096 tokens are used, or the inputs of a raw network of
    linear layers with ReLU between them: a file of tensors, or the folder that mergekit-pytorch
    wrote. Such a network needs --assume-stack, since its tensors do not show what it is. Two whole
    models are held in memory at a time.
    """
    corrections = repair_checkpoint(merged, parents, data, out, assume_stack)
    if not quiet:
        scales = torch.cat([correction.scale for correction in corrections.values()])
        click.echo(
            f"{len(corrections)} layers, {len(scales)} hidden units: scaled by "
            f"{scales.median():.3g} in the median, {scales.min():.3g} to {scales.max():.3g}.",
            err=True,
        )
