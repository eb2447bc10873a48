"""`fisher_mean`: the mean of inputs that each have a metric of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.kernels.precision import precision_mean
from mergekit_karcher.kernels.shares import precision_shares
from mergekit_karcher.means.finite import check_result
from mergekit_karcher.means.input_gram import InputGram
from mergekit_karcher.means.inputs import Inputs, checked_inputs
from mergekit_karcher.means.matrix_mean import RIDGE, matrix_mean, warn_of_unsolved
from mergekit_karcher.means.metric import FLOOR, check_floor, warn_of_zeros
from mergekit_karcher.sphere.trig import Floats


def fisher_mean(
    tensors: Sequence[torch.Tensor],
    metrics: Sequence[torch.Tensor | InputGram | None] | Literal["self"],
    weights: Sequence[float] | None = None,
    *,
    base: torch.Tensor | None = None,
    floor: float = FLOOR,
    ridge: float = RIDGE,
    labels: Sequence[str] | None = None,
    name: str = "the tensor",
) -> torch.Tensor:
    """The point that is best for all of N models, each in its own metric.

    It minimises J(W) = sum_k w_k <W - W_k, G_k (W - W_k)>. With diagonal metrics it is, element by
    element, the mean of the tensors weighted by w_k G_k (Matena & Raffel 2022, equation 4; with G
    the diagonal Fisher information it is Fisher merging); with the input Grams of a linear layer it
    solves one linear system (Jin et al. 2023, equation 1; `matrix_mean` has it).

    Arguments:
        tensors: N >= 1 of one shape and device; float16, bfloat16, float32 or float64, mixed as you
            like; borrowed. In matrix metrics (out, in), or (experts, out, in).
        metrics: One for each, on its device, all of one kind; only their ratios matter. A tensor of
            its shape, finite and >= 0; None is one everywhere. Or an `InputGram`. Or "self" for
            all: the input Grams t_k' t_k / |t_k|^2 of the changes t_k = W_k - base; tensors of one
            axis or none get the weighted linear mean then. A metric of zero gives its model no
            weight; where all are zero, the weighted linear mean is taken, with a warning.
        weights: N finite numbers >= 0, not all zero; by default all equal.
        base: What the models were trained from, like the tensors; needed for "self" only.
        floor: Of a diagonal metric, the fraction of its mean over the tensor that is added to it,
            so that where no model is sure of anything all count alike. Entries of real metrics
            reach 1e-24; an absolute floor would drown them. Elements where all metrics and the
            floor are zero get the weighted linear mean.
        ridge: Of matrix metrics, how strongly the mean is drawn to the weighted linear mean, which
            what cannot be solved is: a fraction of their mean eigenvalue, as `matrix_mean` has it.
        labels: The models, for messages.
        name: The tensor, for messages.

    Returns:
        A new tensor of the dtype that all tensors promote to, rounded once; sums run in float64.

    Raises:
        KarcherError: For anything that it cannot merge.
    """
    given = None if isinstance(metrics, str) else metrics
    if given is None and (metrics != "self" or base is None):
        raise KarcherError(
            f'{name} has metrics={metrics!r}: give one metric for each tensor, or "self" with '
            "base=, what the models were trained from."
        )
    around = base if given is None else None
    inputs = checked_inputs(name, tensors, labels, weights, base=around, metrics=given)
    is_matrix = inputs.grams is not None or (given is None and tensors[0].ndim > 1)
    if inputs.metrics_are_zero:
        warn_of_zeros(name)
    if not is_matrix:
        return precision_weighted(inputs, floor)
    mean = matrix_mean(inputs, ridge)
    if mean.unsolved:
        warn_of_unsolved(name)
    return mean.tensor


def precision_weighted(
    inputs: Inputs, floor: float, saved_as: torch.dtype | None = None
) -> torch.Tensor:
    """`fisher_mean` of checked inputs in diagonal metrics; without any all elements count alike.

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
    """How much each of N inputs counts, (N,): on average over elements, or by the traces of Grams.

    The metrics of changes from a base have a trace of one.
    """
    check_floor(floor)
    if inputs.grams is not None and not inputs.metrics_are_zero:
        counts = inputs.weights * [gram.trace() for gram in inputs.grams]
        return np.array(counts / counts.sum())
    alike = (None,) * len(inputs.tensors)
    metrics = alike if inputs.metrics_are_zero else inputs.metrics or alike
    return np.array(
        precision_shares(
            [None if metric is None else metric.values for metric in metrics],
            inputs.weights.tolist(),
            [0.0 if metric is None else floor * metric.mean for metric in metrics],
        )
    )
