"""The precision-weighted mean of one tensor of several models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.kernels.precision import precision_mean
from mergekit_karcher.kernels.sums import sum_and_least
from mergekit_karcher.means.metric import FLOOR, check_floor, checked_total, warn_of_zeros


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

    tensors: N >= 1 of one shape and device, floating, mixed as you like; borrowed.
    metrics: one for each, of its shape and device, floating, finite and >= 0; None is one
        everywhere. Only their ratios matter. A metric that is zero everywhere gives its model no
        weight here; where all are, the weighted mean is taken, with a warning.
    weights: N finite numbers >= 0, not all zero; default all equal.
    floor: added to each metric, as a fraction of its own mean over the tensor, so that where no
        model is sure of anything all count alike. Entries of real metrics reach 1e-24; an absolute
        floor would drown them.
    labels, name: of the models and the tensor, for messages.

    Returns the promoted dtype of the tensors, rounded once; sums run in float64.
    Raises `KarcherError` for anything else.
    """
    count = len(tensors)
    labels = labels or [f"input {index}" for index in range(count)]
    shares = [1.0] * count if weights is None else [float(weight) for weight in weights]
    merged, seen = precision_weighted(tensors, metrics, shares, floor, labels, name)
    if not seen:
        warn_of_zeros(name)
    return merged


def precision_weighted(
    tensors: Sequence[torch.Tensor],
    metrics: Sequence[torch.Tensor | None],
    shares: Sequence[float],
    floor: float,
    labels: Sequence[str],
    name: str,
) -> tuple[torch.Tensor, bool]:
    """The same, and whether any metric is more than zeros."""
    count = len(tensors)
    if len(metrics) != count or len(shares) != count:
        raise KarcherError(f"{name} needs one metric and one weight for each of {count} tensors.")
    check_floor(floor)
    if not all(0 <= share < math.inf for share in shares) or not any(shares):
        raise KarcherError(
            f"The weights for {name} are {shares}: give finite numbers of 0 or more, not all 0."
        )
    chosen = [index for index, share in enumerate(shares) if share > 0]
    floors = [0.0] * count
    empty = []
    for index in chosen:
        metric = metrics[index]
        _check_tensor(tensors[index], tensors[chosen[0]], labels[index], name)
        if metric is None:
            continue
        total = checked_total(metric, tensors[index], labels[index], name)
        floors[index] = floor * total / max(1, metric.numel())
        if total == 0:
            empty.append(index)
    used = [index for index in chosen if index not in empty]
    own, seen = list(metrics), bool(used)
    if not seen:
        used, own = chosen, [None] * count
    dtype = reduce(torch.promote_types, (tensors[index].dtype for index in chosen))
    if len(used) == 1:
        merged = tensors[used[0]].to(dtype, copy=True)
    else:
        merged = precision_mean(
            [tensors[index] for index in used],
            [own[index] for index in used],
            [shares[index] for index in used],
            [floors[index] for index in used],
            dtype,
        )
    if not math.isfinite(sum_and_least(merged)[0]):
        # A mean is not finite only where one of its inputs is not; a sum is quicker to look at.
        for index in used:
            _check_finite(tensors[index], labels[index], name)
    return merged, seen


def _check_tensor(tensor: torch.Tensor, first: torch.Tensor, label: str, name: str) -> None:
    if not tensor.is_floating_point() or tensor.shape != first.shape:
        raise KarcherError(
            f"{name} of {label} is {tensor.dtype} of shape {tuple(tensor.shape)}, but a mean needs "
            f"floating-point tensors of one shape, {tuple(first.shape)} here."
        )


def _check_finite(tensor: torch.Tensor, label: str, name: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise KarcherError(
            f"{name} of {label} has values that are not finite: repair or leave out that model, or "
            "give it a weight of 0."
        )
