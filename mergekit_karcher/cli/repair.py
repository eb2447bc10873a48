"""`mergekit-karcher repair`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file
from torch import nn

from mergekit_karcher.align.checkpoint import Checkpoint
from mergekit_karcher.align.families import specification_for
from mergekit_karcher.align.repair import corrected, repair
from mergekit_karcher.align.symmetry import Specification
from mergekit_karcher.cli.main import examples, logged
from mergekit_karcher.errors import KarcherError

_WINDOW = 64
_MOST_WINDOWS = 64


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
    help="Calibration: a text, or for a raw network a file with one tensor of inputs.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="The repaired checkpoint.",
)
@logged
def main(merged: str, parents: tuple[str, ...], data: Path, out: Path, quiet: bool) -> None:
    """Give the hidden units of a merged network the liveliness of its parents' (REPAIR).

    MERGED is what mergekit made of the aligned PARENTs. Each hidden unit's pre-activation is scaled
    (and shifted, where the layer has a bias) to the mean of the parents' statistics on the data: a
    text of which up to 4096 tokens are used, or the inputs of a plain stack of linear layers with
    ReLU between. Whole models are held in memory, two at a time.
    """
    if out.exists():
        raise KarcherError(f"{out} exists: name a place that does not.")
    raw = Path(merged).is_file()
    if raw and out.suffix != Path(merged).suffix:
        raise KarcherError(f"{out} must end in {Path(merged).suffix}, as {merged} does.")
    own = Checkpoint(merged, out.stem if raw else out.name)
    specification = specification_for(own.config, own.shapes, residual=False)
    axes = {
        feed.removesuffix(".weight"): move.axis
        for symmetry in specification.symmetries
        for move in symmetry.moves
        for feed in symmetry.feeds
        if move.tensor == feed and move.block == 1
    }
    load, run = _stack(own, data) if own.is_raw else _language_model(merged, data)
    network = load(merged)
    modules = {_module_name(network, name): name for name in axes}
    found = repair(network, map(load, parents), run, list(modules))
    corrections = {modules[name]: correction for name, correction in found.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    own.write(
        out.parent,
        lambda name, tensor: corrected(name, tensor, axes, corrections),
        own.shapes,
        {},
    )
    if not quiet:
        scales = torch.cat([correction.scale for correction in corrections.values()])
        click.echo(
            f"{len(corrections)} layers, {len(scales)} hidden units: scaled by "
            f"{scales.median():.3g} in the median, {scales.min():.3g} to {scales.max():.3g}.",
            err=True,
        )


def _module_name(network: nn.Module, name: str) -> str:
    """Checkpoints of bare models leave out the name that the model has under its head."""
    inner = f"{getattr(network, 'base_model_prefix', '')}.{name}"
    modules = dict(network.named_modules())
    return name if name in modules or inner not in modules else inner


Load = Callable[[str], nn.Module]
Run = Callable[[nn.Module], Any]


def _language_model(merged: str, data: Path) -> tuple[Load, Run]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(merged)(data.read_text(encoding="utf-8")).input_ids
    count = min(len(tokens) // _WINDOW, _MOST_WINDOWS)
    if count == 0:
        raise KarcherError(f"{data} has {len(tokens)} tokens: give a text of at least {_WINDOW}.")
    windows = torch.tensor(tokens[: count * _WINDOW]).view(count, _WINDOW)

    def load(reference: str) -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
        return model.eval()

    return load, lambda model: model(input_ids=windows)


class Stack(nn.Module):
    """Linear layers with ReLU between, by the names that a raw checkpoint has for them."""

    def __init__(self, names: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
            layer.weight = nn.Parameter(weight.float(), requires_grad=False)
            if bias is not None:
                layer.bias = nn.Parameter(bias.float(), requires_grad=False)
            parent = self
            *outer, last = name.split(".")
            for part in outer:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of the last layer."""
        for number, name in enumerate(self.names):
            x = self.get_submodule(name)(x if number == 0 else x.relu())
        return x


def _stack(own: Checkpoint, data: Path) -> tuple[Load, Run]:
    tensors = load_file(data) if data.suffix == ".safetensors" else torch.load(data)
    inputs = tensors if isinstance(tensors, torch.Tensor) else next(iter(tensors.values()))
    if any(len(shape) > 2 or "running" in name for name, shape in own.shapes.items()):
        raise KarcherError(
            f"{own.reference} is no stack of linear layers alone, so what lies between its layers "
            "is not known: use mergekit_karcher.align.repair on the module itself."
        )
    specification = specification_for(None, own.shapes, residual=False)
    names = [*(symmetry.name for symmetry in specification.symmetries), _last(specification)]

    def load(reference: str) -> nn.Module:
        checkpoint = Checkpoint(reference, "parent")
        return Stack(names, {name: checkpoint.get(name) for name in checkpoint.shapes})

    return load, lambda model: model(inputs.flatten(1).float())


def _last(specification: Specification) -> str:
    moves = specification.symmetries[-1].moves
    return next(m.tensor for m in moves if m.axis == 1).removesuffix(".weight")
