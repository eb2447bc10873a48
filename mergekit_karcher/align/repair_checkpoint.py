"""Repair a merged checkpoint: read it and its parents, correct its hidden units, write it anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from mergekit_karcher.align import calibration
from mergekit_karcher.align.checkpoint import Checkpoint
from mergekit_karcher.align.families import specification_for
from mergekit_karcher.align.repair import Correction, corrected, repair
from mergekit_karcher.errors import KarcherError


def repair_checkpoint(
    merged: str, parents: Sequence[str], data: Path, out: Path
) -> dict[str, Correction]:
    """Write a merged model whose hidden units have the statistics of its aligned parents'.

    merged: a Hugging Face model, or a raw stack of linear layers.
    data: a text, or for a stack a file with one tensor of inputs, see `calibration`.

    Two whole models are in memory at a time. Returns the correction of each layer that was changed.
    Raises `KarcherError` if out is there already or has another ending than merged, or if the
    model or the data is of a kind that cannot be used.
    """
    if out.exists():
        raise KarcherError(f"{out} exists: name a place that does not.")
    is_raw = Path(merged).is_file()
    if is_raw and out.suffix != Path(merged).suffix:
        raise KarcherError(f"{out} must end in {Path(merged).suffix}, as {merged} does.")
    checkpoint = Checkpoint(merged, out.stem if is_raw else out.name)
    axes = _unit_axes(checkpoint)
    if is_raw:
        load, run = calibration.for_stack(checkpoint, data)
    else:
        load, run = calibration.for_language_model(merged, data)
    network = load(merged)
    modules = {_module_name(network, name): name for name in axes}
    by_module = repair(network, map(load, parents), run, list(modules))
    corrections = {modules[module]: correction for module, correction in by_module.items()}
    checkpoint.write(
        out.parent,
        lambda name: corrected(name, checkpoint.read(name), axes, corrections),
        checkpoint.shapes,
        {},
    )
    return corrections


def _unit_axes(checkpoint: Checkpoint) -> dict[str, int]:
    """The layers whose outputs are pre-activations, and the axis of the weight that counts them."""
    specification = specification_for(checkpoint.config, checkpoint.shapes, residual=False)
    return {
        move.tensor.removesuffix(".weight"): move.axis
        for symmetry in specification.symmetries
        for move in symmetry.moves
        if move.tensor in symmetry.feeds and move.block == 1
    }


def _module_name(network: nn.Module, name: str) -> str:
    """Checkpoints of bare models leave out the name that the model has under its head."""
    modules = dict(network.named_modules())
    under_head = f"{getattr(network, 'base_model_prefix', '')}.{name}"
    return name if name in modules or under_head not in modules else under_head
