"""The metric that several models share: the sum of theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.kernels.metrics import SharedMetric
from mergekit_karcher.metric.checks import check_floor, checked_total


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
