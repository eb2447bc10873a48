"""REPAIR (Jordan et al. 2023): rescale the hidden units of a merged network.

Averaging makes activations vary less, from layer to layer. Here the pre-activation of every hidden
unit is scaled, and shifted where there is a bias, so that its mean and standard deviation on
calibration data are the average of the parents'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
    """The corrections of layers of a merged network, in the order in which the data passes them.

    Each layer is corrected with those before it corrected already, and from the statistics of all
    that passes it. If run calls the network several times (in batches), these are only known after
    all of them: then the network is run once more for each layer.

    merged: is not changed.
    parents: aligned, with the same modules; taken one after the other.
    run: calls a network on the same data each time.
    layers: linear or convolutional modules whose outputs are pre-activations; one that run does
        not call raises `KarcherError`.
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
        return _corrected_output(module, output, corrections[name])

    def compute_and_correct(name: str, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        nonlocal repeated
        repeated |= name in corrections
        corrections[name] = _correction(_moments(module, output), targets[name], module)
        return correct(name, module, output)

    with _hooked(merged, layers, compute_and_correct):
        run(merged)
    _check_all_called(layers, corrections)
    if repeated:
        order = list(corrections)
        corrections.clear()
        for name in order:
            with _hooked(merged, list(corrections), correct):
                measured = moments(merged, run, [name])[name]
            corrections[name] = _correction(measured, targets[name], merged.get_submodule(name))
    return corrections


def moments(network: nn.Module, run: Run, layers: Sequence[str]) -> dict[str, Moments]:
    """The moments of all outputs of each of the modules, over all calls.

    Raises `KarcherError` if run does not call a module.
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
    """A tensor of a network, in its dtype, after the corrections of layers.

    axes: for each corrected layer, the axis of its weight that counts the units.
    """
    layer, _, part = name.rpartition(".")
    if layer not in corrections or part not in ("weight", "bias"):
        return tensor
    scale, shift = corrections[layer]
    if part == "bias":
        return (tensor.double() * scale + shift).to(tensor.dtype)
    by_unit = scale.view(-1, *[1] * (tensor.ndim - 1 - axes[layer]))
    return (tensor.double() * by_unit).to(tensor.dtype)


def reestimate(network: nn.Module, run: Run) -> None:
    """Compute the statistics of all batch norms of a network anew, in place.

    Each norm gets the mean and the unbiased variance of all values that reach it, over all calls.
    As in training, every call is normalised by its own statistics: behind a first norm, what
    reaches the others depends on how the data is divided into calls, so let them be large.

    Arguments:
        network: Its batch norms are in evaluation mode afterwards.
        run: Calls the network on the calibration data, in as many calls as it likes.
    """
    norms = {name: norm for name, norm in network.named_modules() if isinstance(norm, _NORMS)}
    momenta = [norm.momentum for norm in norms.values()]
    tracking = [name for name, norm in norms.items() if norm.track_running_stats]
    collected: dict[str, Moments] = {}

    def collect(name: str, norm: Any, output: torch.Tensor) -> None:
        size = output.numel() // output.shape[1]
        # What the norm holds is the unbiased variance of this call.
        variance = norm.running_var.double() * (size - 1) / size
        # A copy, since the next call writes over it.
        mean = norm.running_mean.to(torch.float64, copy=True)
        more = Moments(mean, variance.sqrt(), size)
        if name in collected:
            more = collected[name].with_more(more)
            norm.running_mean.copy_(more.mean)
            norm.running_var.copy_(more.deviation.square() * more.size / (more.size - 1))
        collected[name] = more

    try:
        for norm in norms.values():
            norm.reset_running_stats()
            # Running statistics are those of the last call alone; `collect` puts them together.
            norm.momentum = 1.0
            norm.train()
        with _hooked(network, tracking, collect):
            run(network)
    finally:
        for norm, momentum in zip(norms.values(), momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def _correction(measured: Moments, target: Moments, module: nn.Module) -> Correction:
    tiny = torch.finfo(torch.float64).tiny
    constant = measured.deviation <= _CONSTANT * measured.mean.abs() + tiny
    scale = torch.where(constant, 1.0, target.deviation / measured.deviation.clamp(min=1e-300))
    if getattr(module, "bias", None) is None:
        return Correction(scale, torch.zeros_like(scale))
    return Correction(scale, target.mean - measured.mean * scale)


def _corrected_output(
    module: nn.Module, output: torch.Tensor, correction: Correction
) -> torch.Tensor:
    after = [1] * (output.ndim - 1 - _unit_axis(module, output))
    scale, shift = (part.to(output).view(-1, *after) for part in correction)
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
    with ExitStack() as hooks, torch.no_grad():
        for name in layers:
            handle = network.get_submodule(name).register_forward_hook(
                lambda module, _, output, name=name: action(name, module, output)
            )
            hooks.callback(handle.remove)
        yield
