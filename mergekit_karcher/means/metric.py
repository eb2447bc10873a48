"""Diagonal metrics: what a model's metric must be, and the one that several models share."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.kernels.shared_metric import SharedMetric
from mergekit_karcher.kernels.sums import sum_and_least

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_LOG = logging.getLogger(__name__)

# Of a metric's mean over the tensor.
FLOOR = 1e-6


class DiagonalMetric(NamedTuple):
    """One model's metric of one tensor, checked."""

    values: torch.Tensor  # of the tensor's shape, floating, finite and >= 0; borrowed
    mean: float  # of all values, in float64; zero if all of them are


def checked_metric(
    values: torch.Tensor, tensor: torch.Tensor, label: str, name: str
) -> DiagonalMetric:
    """A model's metric of a tensor, after one pass over its values; label and name: for messages.

    Raises `KarcherError` unless it has the tensor's shape and finite floating-point numbers >= 0.
    """
    if values.shape != tensor.shape:
        raise KarcherError(
            f"The metric of {name} for {label} has shape {tuple(values.shape)}, but the tensor has "
            f"{tuple(tensor.shape)}: make it anew from that model."
        )
    if values.dtype not in DTYPES:
        raise KarcherError(
            f"The metric of {name} for {label} is {values.dtype}: give floating-point numbers, "
            "float16, bfloat16, float32 or float64."
        )
    total, least = sum_and_least(values)
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
    return DiagonalMetric(values, total / max(1, values.numel()))


def check_floor(floor: float) -> None:
    """Raise `KarcherError` unless floor is a finite fraction of 0 or more."""
    if not 0 <= floor < math.inf:
        raise KarcherError(f"floor is {floor}: give a finite fraction of 0 or more.")


def shared_metric(
    metrics: Sequence[DiagonalMetric | None], weights: Sequence[float], floor: float
) -> SharedMetric:
    """G = sum_k w_k (G_k + floor mean(G_k)), element by element.

    A metric of None is one everywhere; weights are finite and > 0. Without a single G_k that is not
    zero everywhere the result has no tensors: it is the same for every element.
    """
    check_floor(floor)
    # Nothing depends on the scale of G: angles and the coefficients of a mean are ratios.
    largest = max(weights)
    values, shares, constant, mean = [], [], 0.0, 0.0
    for metric, weight in zip(metrics, weights, strict=True):
        share = weight / largest
        if metric is None:
            constant += share
        elif metric.mean > 0:
            values.append(metric.values)
            shares.append(share)
            constant += share * floor * metric.mean
            mean += share * metric.mean
    exponent = math.frexp(mean + constant)[1] // 2
    return SharedMetric(
        values,
        [math.ldexp(share, -2 * exponent) for share in shares],
        math.ldexp(constant, -2 * exponent),
        exponent,
    )


def warn_of_zeros(name: str) -> None:
    """Say that a tensor is merged as if there were no metrics."""
    _LOG.warning("The metrics of %s are zero in every model: it is merged as without any.", name)
