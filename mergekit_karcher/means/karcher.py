"""`karcher_mean`, for tensors in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.means.autograd import merge
from mergekit_karcher.means.inputs import checked_inputs
from mergekit_karcher.means.metric import FLOOR, warn_of_zeros
from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.means.solve import MAX_ITER, TOL, Settings
from mergekit_karcher.sphere.magnitude import Magnitude


def karcher_mean(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    *,
    base: torch.Tensor | None = None,
    granularity: Literal["tensor", "row"] = "tensor",
    magnitude: Literal["arithmetic", "linear", "geometric"] = "arithmetic",
    metrics: Sequence[torch.Tensor | None] | None = None,
    floor: float = FLOOR,
    pad: bool = False,
    max_iter: int = MAX_ITER,
    tol: float = TOL,
) -> tuple[torch.Tensor, KarcherMean]:
    """The weighted Karcher mean of N tensors.

    Its direction is the point of the unit sphere with the least weighted sum of squared angles to
    the inputs (Ye 2025, equation 9). Scratch memory is bounded whatever N and the size are, but for
    N coefficients a row.

    Arguments:
        tensors: N >= 1 of one shape and device; float16, bfloat16, float32 or float64, mixed as you
            like, strided or not. Borrowed: never modified, and the result shares no memory.
        weights: N finite numbers >= 0, not all zero; by default all equal. An input of weight zero
            is left out entirely.
        base: One more such tensor, the origin of the sphere: the mean is that of the differences
            W_i - base, added to the base. By default the origin is zero.
        granularity: "tensor" takes each tensor as one vector; "row" each index of its first axis by
            itself, and tensors of fewer than two axes whole.
        magnitude: The length, from w_i that sum to one: "arithmetic", sum_i w_i |W_i| (equation 6);
            "linear", |sum_i w_i W_i|; "geometric", prod_i |W_i|^(w_i).
        metrics: One for each input, of its shape and device, floating, finite and >= 0; None is one
            everywhere. Angles and lengths are then those of the metric that the inputs share,
            G = sum_i w_i (G_i + floor mean(G_i)), with <x, y>_G = sum_e G_e x_e y_e.
        floor: The fraction of each metric's mean that is added to it.
        pad: Fill tensors whose shapes differ up with zeros, at the end of each axis (section 6.2).
        max_iter: The most steps that are taken; a handful suffices.
        tol: Radians, the longest tangent step that counts as converged.

    Returns:
        The mean, of the promoted dtype and rounded once, and how it was computed. Gradients flow to
        every input that requires one, none to metrics.

    Raises:
        KarcherError: For anything that it cannot merge.
    """
    tensors, settings = list(tensors), _settings(granularity, magnitude, max_iter, tol)
    if pad:
        tensors, base, metrics = _padded(tensors, base, metrics)
    inputs = checked_inputs("the tensor", tensors, None, weights, base=base, metrics=metrics)
    if inputs.metrics_are_zero:
        warn_of_zeros(inputs.name)
    inputs = inputs.sharing_a_metric(floor)
    if inputs.shared_metric is not None and floor == 0 and any(t.requires_grad for t in tensors):
        raise KarcherError("Gradients through a mean in a metric need a floor above 0.")
    merged, solution = merge(inputs, settings)
    return merged, solution.mean.with_others(inputs.places, len(tensors))


def _settings(granularity: Any, magnitude: str, max_iter: int, tol: float) -> Settings:
    if granularity not in ("tensor", "row"):
        raise KarcherError(f"granularity is {granularity!r}: give tensor or row.")
    if magnitude not in [kind.value for kind in Magnitude]:
        raise KarcherError(f"magnitude is {magnitude!r}: give arithmetic, linear or geometric.")
    return Settings(granularity, Magnitude(magnitude), max_iter, tol)


def _padded(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    metrics: Sequence[torch.Tensor | None] | None,
) -> tuple[list[Any], torch.Tensor | None, Sequence[torch.Tensor | None] | None]:
    given = [*tensors, *(() if base is None else (base,))]
    if len(axes := sorted({tensor.ndim for tensor in given})) > 1:
        raise KarcherError(
            f"The tensors have {' and '.join(map(str, axes))} axes: padding makes axes longer, it "
            "does not add any."
        )
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in given), strict=True)]
    # A metric of another shape than its tensor is refused later, by its own shape.
    wider = metrics and [
        metric if metric is None or metric.shape != tensor.shape else _wide(metric, shape)
        for metric, tensor in zip(metrics, tensors, strict=False)
    ]
    return [_wide(t, shape) for t in tensors], None if base is None else _wide(base, shape), wider


def _wide(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if list(tensor.shape) == shape:
        return tensor
    # torch counts axes from the last one, and gives each its room before and after.
    sizes = zip(reversed(tensor.shape), reversed(shape), strict=True)
    room = [side for size, wanted in sizes for side in (0, wanted - size)]
    return torch.nn.functional.pad(tensor, room)
