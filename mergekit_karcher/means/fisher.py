"""`fisher_mean`: the precision-weighted mean, each input in its own diagonal metric."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mergekit_karcher.kernels.precision import precision_mean
from mergekit_karcher.kernels.shares import precision_shares
from mergekit_karcher.means.finite import check_result
from mergekit_karcher.means.inputs import Inputs, checked_inputs
from mergekit_karcher.means.metric import FLOOR, check_floor, warn_of_zeros
from mergekit_karcher.sphere.trig import Floats


def fisher_mean(
    tensors: Sequence[torch.Tensor],
    metrics: Sequence[torch.Tensor | None],
    weights: Sequence[float] | None = None,
    *,
    floor: float = FLOOR,
    labels: Sequence[str] | None = None,
    name: str = "the tensor",
) -> torch.Tensor:
    """The point that is best for all of N models, each in its own diagonal metric.

    It minimises J(W) = sum_k w_k sum_i G_ki (W_i - W_ki)^2, element by element: the mean of the
    tensors weighted by w_k G_k (Matena & Raffel 2022, equation 4; with G the diagonal Fisher
    information it is Fisher merging).

    Arguments:
        tensors: N >= 1 of one shape and device; float16, bfloat16, float32 or float64, mixed as you
            like; borrowed.
        metrics: One for each, of its shape and device, floating, finite and >= 0; None is one
            everywhere. Only their ratios matter. A metric that is zero everywhere gives its model
            no weight; where all are, the weighted mean is taken, with a warning.
        weights: N finite numbers >= 0, not all zero; by default all equal.
        floor: The fraction of each metric's mean over the tensor that is added to it, so that where
            no model is sure of anything all count alike. Entries of real metrics reach 1e-24; an
            absolute floor would drown them. Elements where all metrics and the floor are zero get
            the weighted mean.
        labels: The models, for messages.
        name: The tensor, for messages.

    Returns:
        A new tensor of the dtype that all tensors promote to, rounded once; sums run in float64.

    Raises:
        KarcherError: For anything that it cannot merge.
    """
    inputs = checked_inputs(name, tensors, labels, weights, metrics=metrics)
    if inputs.metrics_are_zero:
        warn_of_zeros(name)
    return precision_weighted(inputs, floor)


def precision_weighted(
    inputs: Inputs, floor: float, saved_as: torch.dtype | None = None
) -> torch.Tensor:
    """`fisher_mean` of checked inputs; without metrics all elements count alike.

    saved_as: what the result is cast to in the end; `KarcherError` if it is not finite in that.
    """
    check_floor(floor)
    alike = (None,) * len(inputs.tensors)
    metrics = alike if inputs.metrics_are_zero else inputs.metrics or alike
    entries = zip(inputs.tensors, metrics, inputs.weights.tolist(), strict=True)
    sure = [entry for entry in entries if entry[1] is None or entry[1].mean > 0]
    if len(sure) == 1:
        result = sure[0][0].to(inputs.dtype, copy=True)
    else:
        result = precision_mean(
            [tensor for tensor, _, _ in sure],
            [None if metric is None else metric.values for _, metric, _ in sure],
            [weight for _, _, weight in sure],
            [0.0 if metric is None else floor * metric.mean for _, metric, _ in sure],
            inputs.dtype,
        )
    check_result(result, inputs, saved_as or result.dtype)
    return result


def shares_of(inputs: Inputs, floor: float) -> Floats:
    """How much each of N inputs counts in `precision_weighted`, on average over elements, (N,)."""
    check_floor(floor)
    alike = (None,) * len(inputs.tensors)
    metrics = alike if inputs.metrics_are_zero else inputs.metrics or alike
    return np.array(
        precision_shares(
            [None if metric is None else metric.values for metric in metrics],
            inputs.weights.tolist(),
            [0.0 if metric is None else floor * metric.mean for metric in metrics],
        )
    )
