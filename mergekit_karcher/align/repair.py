"""REPAIR (Jordan et al. 2023): hidden units of a merged network as lively as those of its parents.

Where merged networks agree only in part, their mean's activations are weaker, more so from layer
to layer. Here the pre-activation of each hidden unit is scaled and shifted to the mean over the
parents of its mean and its standard deviation on calibration data; one without a bias is only
scaled. The statistics of batch norms are taken anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

# Runs a network on the calibration data.
Run = Callable[[nn.Module], Any]

# A unit that varies less than this, relative to its mean, has nothing to be scaled.
_STILL = 1e-6

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Moments(NamedTuple):
    """Mean and standard deviation of every unit, float64."""

    mean: torch.Tensor
    deviation: torch.Tensor


class Correction(NamedTuple):
    """What becomes of a layer: scale times its weights, and scale times its bias plus shift."""

    scale: torch.Tensor
    shift: torch.Tensor


def repair(
    merged: nn.Module, parents: Iterable[nn.Module], run: Run, layers: Sequence[str]
) -> dict[str, Correction]:
    """Corrections of the named modules of a merged network; the network itself is not changed.

    parents: aligned, of the same modules; taken one after the other. Each layer is corrected with
    those before it corrected already, in the order in which the data passes them.
    """
    found = [moments(parent, run, layers) for parent in parents]
    targets = {
        name: Moments(*(torch.stack(parts).mean(0) for parts in zip(*own, strict=True)))
        for name in layers
        for own in [[parent[name] for parent in found]]
    }
    corrections: dict[str, Correction] = {}

    def correct(name: str, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        here, target = _moments(module, output), targets[name]
        still = here.deviation <= _STILL * here.mean.abs() + torch.finfo(torch.float64).tiny
        scale = torch.where(still, 1.0, target.deviation / here.deviation.clamp(min=1e-300))
        has_bias = getattr(module, "bias", None) is not None
        shift = target.mean - here.mean * scale if has_bias else torch.zeros_like(scale)
        corrections[name] = Correction(scale, shift)
        shape = _unit_shape(module, output)
        return output * scale.to(output).view(shape) + shift.to(output).view(shape)

    with _hooked(merged, layers, correct):
        run(merged)
    return corrections


def moments(network: nn.Module, run: Run, layers: Sequence[str]) -> dict[str, Moments]:
    """Those of the outputs of the named modules."""
    found: dict[str, Moments] = {}

    def look(name: str, module: nn.Module, output: torch.Tensor) -> None:
        found[name] = _moments(module, output)

    with _hooked(network, layers, look):
        run(network)
    return found


def corrected(
    name: str, tensor: torch.Tensor, axes: Mapping[str, int], corrections: Mapping[str, Correction]
) -> torch.Tensor:
    """A weight or bias of a corrected layer, any other as it is; axes: of the units in weights."""
    module, _, part = name.rpartition(".")
    if module not in corrections or part not in ("weight", "bias"):
        return tensor
    scale, shift = corrections[module]
    if part == "bias":
        return (tensor.double() * scale + shift).to(tensor.dtype)
    shape = [1] * tensor.ndim
    shape[axes[module]] = -1
    return (tensor.double() * scale.view(shape)).to(tensor.dtype)


def reestimate(network: nn.Module, run: Run) -> None:
    """Take the statistics of all batch norms anew, in place, over one run."""
    norms = [module for module in network.modules() if isinstance(module, _NORMS)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    with torch.no_grad():
        run(network)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _moments(module: nn.Module, output: torch.Tensor) -> Moments:
    units = output.detach().double().movedim(_unit_axis(module, output), 0).flatten(1)
    return Moments(units.mean(1), units.std(1, correction=0))


def _unit_axis(module: nn.Module, output: torch.Tensor) -> int:
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return 1 if convolution else output.ndim - 1


def _unit_shape(module: nn.Module, output: torch.Tensor) -> list[int]:
    shape = [1] * output.ndim
    shape[_unit_axis(module, output)] = -1
    return shape


@contextmanager
def _hooked(
    network: nn.Module,
    layers: Sequence[str],
    action: Callable[[str, nn.Module, torch.Tensor], torch.Tensor | None],
) -> Iterator[None]:
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda module, _, output, name=name: action(name, module, output)
        )
        for name in layers
    ]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
