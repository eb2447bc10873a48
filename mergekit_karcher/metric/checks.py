"""What a metric must be: floating numbers of its tensor's shape, finite and not negative."""

from __future__ import annotations

import logging
import math

import torch

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.kernels.metrics import sum_and_least

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
