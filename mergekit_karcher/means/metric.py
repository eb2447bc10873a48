"""Diagonal metrics of models: what they must be, and the one that several models share."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.kernels.shared_metric import SharedMetric
from mergekit_karcher.kernels.sums import sum_and_least

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_LOG = logging.getLogger(__name__)

# Of a metric's own mean over the tensor.
FLOOR = 1e-6


def check_floor(floor: float) -> None:
    """Raise unless it is a fraction."""
    if not 0 <= floor < math.inf:
        raise KarcherError(f"floor is {floor}: give a finite fraction of 0 or more.")


def checked_total(metric: torch.Tensor, tensor: torch.Tensor, label: str, name: str) -> float:
    """The sum of a model's metric of one tensor; raises unless it is one."""
    if metric.shape != tensor.shape:
        raise KarcherError(
            f"The metric of {name} for {label} has shape {tuple(metric.shape)}, but the tensor has "
            f"{tuple(tensor.shape)}: make it anew from that model."
        )
    if metric.dtype not in _DTYPES:
        raise KarcherError(
            f"The metric of {name} for {label} is {metric.dtype}: give floating-point numbers, "
            "float16, bfloat16, float32 or float64."
        )
    total, least = sum_and_least(metric)
    if not math.isfinite(total) or math.isnan(least):
        raise KarcherError(
            f"The metric of {name} for {label} is not finite everywhere: make it anew, or give "
            "that model metric: identity."
        )
    if least < 0:
        raise KarcherError(
            f"The metric of {name} for {label} is negative ({least:.3g}) somewhere, which no "
            "precision can be: make it anew, or give that model metric: identity."
        )
    return total


def warn_of_zeros(name: str) -> None:
    """Say that a tensor is merged as if there were no metrics."""
    _LOG.warning("The metrics of %s are zero in every model: it is merged as without any.", name)


def shared_metric(
    tensors: Sequence[torch.Tensor],
    metrics: Sequence[torch.Tensor | None],
    weights: Sequence[float],
    *,
    floor: float,
    labels: Sequence[str],
    name: str,
) -> SharedMetric:
    """G = sum_k w_k (G_k + floor mean(G_k)), element by element, over the models with a weight.

    tensors: N >= 1, for their shape. metrics: one for each, as in `fisher_mean`; None is one
    everywhere. weights: N finite numbers >= 0. Nothing depends on the scale of G: angles and the
    coefficients of a mean are ratios. Without a single G_k that is not zero everywhere the result
    is flat, has no tensors.
    Raises `KarcherError` for a metric that is none.
    """
    check_floor(floor)
    if len(metrics) != len(tensors):
        raise KarcherError(f"{name} needs one metric for each of {len(tensors)} tensors.")
    largest = max(weights, default=0) or 1.0
    given, shares, constant, mean = [], [], 0.0, 0.0
    for tensor, metric, weight, label in zip(tensors, metrics, weights, labels, strict=True):
        share = weight / largest
        if share == 0:
            continue
        if metric is None:
            constant += share
            continue
        average = checked_total(metric, tensor, label, name) / max(1, metric.numel())
        if average > 0:
            given.append(metric)
            shares.append(share)
            constant += share * floor * average
            mean += share * average
    exponent = math.frexp(mean + constant)[1] // 2
    return SharedMetric(
        given,
        [math.ldexp(share, -2 * exponent) for share in shares],
        math.ldexp(constant, -2 * exponent),
        exponent,
    )
