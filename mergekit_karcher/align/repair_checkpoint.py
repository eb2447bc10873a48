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
    merged: str, parents: Sequence[str], data: Path, out: Path, assume_stack: bool = False
) -> dict[str, Correction]:
    """Write a merged model whose hidden units have the statistics of its aligned parents'.

    merged: a Hugging Face model, or a raw stack of linear layers: a file, or the folder that
        mergekit-pytorch wrote.
    data: a text, or for a stack a file with one tensor of inputs, see `calibration`.
    assume_stack: whether a raw checkpoint is the plain stack of layers that its names suggest.

    Two whole models are in memory at a time. Returns the correction of each layer that was changed.
    Raises `KarcherError` if out is there already or has another ending than merged, or if the
    model or the data is of a kind that cannot be used.
    """
    if out.exists():
        raise KarcherError(f"{out} exists: name a place that does not.")
    is_file = Path(merged).expanduser().is_file()
    checkpoint = Checkpoint(merged, out.stem if is_file else out.name)
    if checkpoint.target(out.parent) != out:
        raise KarcherError(f"{out} must end in {Path(merged).suffix}, as {merged} does.")
    _check_parents(checkpoint, parents)
    if checkpoint.config is None:
        calibration.check_linear(checkpoint)
    axes = _unit_axes(checkpoint, assume_stack)
    if checkpoint.config is None:
        load, run = calibration.for_stack(checkpoint, data)
    else:
        load, run = calibration.for_language_model([merged, *parents], data)
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


def _check_parents(merged: Checkpoint, parents: Sequence[str]) -> None:
    """Raise `KarcherError` if a parent is of another kind or size than the merge."""
    for reference in parents:
        parent = Checkpoint(reference, "parent")
        if merged.config is None and parent.config is not None:
            raise KarcherError(
                f"{merged.reference} has no config.json, but {reference} has: copy that and the "
                f"tokenizer's files from {reference} into {merged.reference}."
            )
        for name, shape in parent.shapes.items():
            if merged.shapes.get(name, shape) != shape:
                raise KarcherError(
                    f"{name} is {list(shape)} in {reference}, but {list(merged.shapes[name])} in "
                    f"{merged.reference}: give the models that were merged, as align wrote them."
                )


def _unit_axes(checkpoint: Checkpoint, assume_stack: bool) -> dict[str, int]:
    """The layers whose outputs are pre-activations, and the axis of the weight that counts them."""
    specification = specification_for(checkpoint.config, checkpoint.shapes, False, assume_stack)
    if specification.joined:
        raise KarcherError(
            f"{checkpoint.reference} is a mixture of experts, which repair does not cover: use the "
            "merge as it is."
        )
    return {
        move.tensor.removesuffix(".weight"): move.axis
        for symmetry in specification.symmetries
        for move in symmetry.moves
        if move.tensor in symmetry.feeds and move.block == 1
    }


def _module_name(network: nn.Module, name: str) -> str:
    """What a layer is called in a network that is loaded without the head of its checkpoint."""
    return name.removeprefix(f"{getattr(network, 'base_model_prefix', '')}.")
