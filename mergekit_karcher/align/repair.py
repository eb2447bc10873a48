"""REPAIR (Jordan et al. 2023): rescale the hidden units of a merged network.

Where networks agree only in part, the activations of their mean vary less than their own, and less
from layer to layer. Here the pre-activation of every hidden unit is scaled and shifted so that its
mean and standard deviation on calibration data are the average of the parents'; where a layer has
no bias it is only scaled. `reestimate` computes the statistics of batch norms anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from mergekit_karcher.errors import KarcherError

# Runs a network on the calibration data, in one or several calls.
Run = Callable[[nn.Module], Any]

# A unit whose deviation is below this, relative to its mean, is constant: it is not scaled.
_CONSTANT = 1e-6

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Moments(NamedTuple):
    """Mean and standard deviation of every unit, (units,) float64, over `size` values of each."""

    mean: torch.Tensor
    deviation: torch.Tensor
    size: int

    def with_more(self, other: Moments) -> Moments:
        """The moments of the values of both, exactly (Chan, Golub, LeVeque 1983)."""
        size = self.size + other.size
        mine, theirs = self.size / size, other.size / size
        gap = other.mean - self.mean
        within = mine * self.deviation.square() + theirs * other.deviation.square()
        variance = within + mine * theirs * gap.square()
        return Moments(self.mean + theirs * gap, variance.sqrt(), size)


class Correction(NamedTuple):
    """What becomes of a layer: scale times its weights, and scale times its bias plus shift.

    Both (units,) float64; shift is zero for a layer without a bias.
    """

    scale: torch.Tensor
    shift: torch.Tensor


def repair(
    merged: nn.Module, parents: Iterable[nn.Module], run: Run, layers: Sequence[str]
) -> dict[str, Correction]:
    """Compute the corrections of layers of a merged network.

    Each layer is corrected with those before it corrected already, and from the statistics of all
    that passes it, weighted by the number of values. If run calls each layer once, one run of the
    merged network is enough. If it calls the network several times (in batches), the correction
    of a layer is only known after all of them: then the network is run once more for each layer.

    Arguments:
        merged: The network; borrowed, and not changed.
        parents: The networks that were merged, aligned, with the same modules; taken one after the
            other.
        run: Calls a network on the calibration data, in as many calls as it likes, on the same data
            each time.
        layers: The names of linear or convolutional modules whose outputs are pre-activations.

    Returns:
        The correction of each layer, in the order in which the data passes them.

    Raises:
        KarcherError: If run does not call a layer.
    """
    by_parent = [moments(parent, run, layers) for parent in parents]
    targets = {
        name: Moments(
            torch.stack([parent[name].mean for parent in by_parent]).mean(0),
            torch.stack([parent[name].deviation for parent in by_parent]).mean(0),
            sum(parent[name].size for parent in by_parent),
        )
        for name in layers
    }
    corrections: dict[str, Correction] = {}
    repeated = False

    def correct(name: str, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        nonlocal repeated
        repeated |= name in corrections
        corrections[name] = _correction(_moments(module, output), targets[name], module)
        return _corrected_output(module, output, corrections[name])

    with _hooked(merged, layers, correct):
        run(merged)
    _check_all_called(layers, corrections)
    return _layer_by_layer(merged, run, list(corrections), targets) if repeated else corrections


def _layer_by_layer(
    merged: nn.Module, run: Run, layers: Sequence[str], targets: Mapping[str, Moments]
) -> dict[str, Correction]:
    """The corrections of layers in the order of the data, each from a run over all of it."""
    corrections: dict[str, Correction] = {}

    def correct(name: str, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return _corrected_output(module, output, corrections[name])

    for name in layers:
        with _hooked(merged, list(corrections), correct):
            measured = moments(merged, run, [name])[name]
        corrections[name] = _correction(measured, targets[name], merged.get_submodule(name))
    return corrections


def moments(network: nn.Module, run: Run, layers: Sequence[str]) -> dict[str, Moments]:
    """Measure the outputs of modules.

    Arguments:
        network: Borrowed, and not changed.
        run: Calls the network on the calibration data, in as many calls as it likes.
        layers: The names of the modules.

    Returns:
        The moments of all outputs of each module, over all calls.

    Raises:
        KarcherError: If run does not call a module.
    """
    measured: dict[str, Moments] = {}

    def measure(name: str, module: nn.Module, output: torch.Tensor) -> None:
        more = _moments(module, output)
        measured[name] = measured[name].with_more(more) if name in measured else more

    with _hooked(network, layers, measure):
        run(network)
    _check_all_called(layers, measured)
    return measured


def corrected(
    name: str, tensor: torch.Tensor, axes: Mapping[str, int], corrections: Mapping[str, Correction]
) -> torch.Tensor:
    """Apply the corrections of layers to a tensor of their network.

    Arguments:
        name: Of the tensor.
        tensor: Borrowed.
        axes: For each corrected layer, the axis of its weight that counts the units.
        corrections: Those of each layer.

    Returns:
        A new tensor of the same dtype for the weight or bias of a corrected layer; any other tensor
        as it is.
    """
    layer, _, part = name.rpartition(".")
    if layer not in corrections or part not in ("weight", "bias"):
        return tensor
    scale, shift = corrections[layer]
    if part == "bias":
        return (tensor.double() * scale + shift).to(tensor.dtype)
    shape = [1] * tensor.ndim
    shape[axes[layer]] = -1
    return (tensor.double() * scale.view(shape)).to(tensor.dtype)


def reestimate(network: nn.Module, run: Run) -> None:
    """Compute the statistics of all batch norms of a network anew, in place.

    Each norm gets the mean and the unbiased variance of all values that reach it, over all calls,
    weighted by the number of values. As in training, every call is normalised by its own
    statistics: behind a first norm, what reaches the others depends on how the data is divided
    into calls, so let them be large.

    Arguments:
        network: Its running statistics are replaced; its batch norms are in evaluation mode
            afterwards.
        run: Calls the network on the calibration data, in as many calls as it likes.
    """
    norms = [module for module in network.modules() if isinstance(module, _NORMS)]
    momenta = [norm.momentum for norm in norms]
    collected: dict[nn.Module, Moments] = {}

    def collect(norm: Any, _inputs: Any, output: torch.Tensor) -> None:
        size = output.numel() // output.shape[1]
        # What the norm holds is the unbiased variance of this call.
        variance = norm.running_var.double() * (size - 1) / size
        # A copy, since the next call writes over it.
        mean = norm.running_mean.to(torch.float64, copy=True)
        more = Moments(mean, variance.sqrt(), size)
        if norm in collected:
            more = collected[norm].with_more(more)
            norm.running_mean.copy_(more.mean)
            norm.running_var.copy_(more.deviation.square() * more.size / (more.size - 1))
        collected[norm] = more

    tracking = [norm for norm in norms if norm.track_running_stats]
    handles = [norm.register_forward_hook(collect) for norm in tracking]
    try:
        for norm in norms:
            norm.reset_running_stats()
            # Running statistics are those of the last call alone; `collect` puts them together.
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            run(network)
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def _correction(measured: Moments, target: Moments, module: nn.Module) -> Correction:
    tiny = torch.finfo(torch.float64).tiny
    constant = measured.deviation <= _CONSTANT * measured.mean.abs() + tiny
    scale = torch.where(constant, 1.0, target.deviation / measured.deviation.clamp(min=1e-300))
    has_bias = getattr(module, "bias", None) is not None
    return Correction(
        scale, target.mean - measured.mean * scale if has_bias else torch.zeros_like(scale)
    )


def _corrected_output(
    module: nn.Module, output: torch.Tensor, correction: Correction
) -> torch.Tensor:
    shape = [1] * output.ndim
    shape[_unit_axis(module, output)] = -1
    scale, shift = (part.to(output).view(shape) for part in correction)
    return output * scale + shift


def _moments(module: nn.Module, output: torch.Tensor) -> Moments:
    units = output.detach().double().movedim(_unit_axis(module, output), 0).flatten(1)
    return Moments(units.mean(1), units.std(1, correction=0), units.shape[1])


def _unit_axis(module: nn.Module, output: torch.Tensor) -> int:
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return 1 if convolution else output.ndim - 1


def _check_all_called(layers: Sequence[str], called: Mapping[str, Any]) -> None:
    for name in layers:
        if name not in called:
            raise KarcherError(
                f"The calibration never called {name}: leave it out, or run the network so that "
                "the data passes it."
            )


@contextmanager
def _hooked(
    network: nn.Module,
    layers: Sequence[str],
    action: Callable[[str, nn.Module, torch.Tensor], torch.Tensor | None],
) -> Iterator[None]:
    """Do something with the output of every named module, without gradients."""
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
