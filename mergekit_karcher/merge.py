"""One group of tensors: Gram matrix, mean, combination."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import torch

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.kernels.combine import combine
from mergekit_karcher.kernels.gram import gram
from mergekit_karcher.maths.gradient import pull_back
from mergekit_karcher.maths.mean import KarcherMean, mean_of_gram

MAX_ITER = 100
TOL = 1e-12

# Above this angle to the mean (radians), rounding errors of a Gram matrix are amplified more than
# 35 times, and float32 inputs on the CPU get an exact one after all. N orthogonal inputs are there
# from N = 35 on.
_WIDE_ANGLE = 1.4

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def karcher_mean(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    *,
    max_iter: int = MAX_ITER,
    tol: float = TOL,
) -> tuple[torch.Tensor, KarcherMean]:
    """The weighted Karcher mean of N tensors, each taken as one vector.

    Direction: the point of the unit sphere with the least weighted sum of squared angles to the
    inputs (Ye 2025, equation 9). Length: the weighted mean of their norms (equation 6).

    tensors: N >= 1 of one shape and one device; float16, bfloat16, float32 or float64, mixed as
        you like, strided or not. Borrowed: never modified, and the result shares no memory.
    weights: N finite numbers >= 0, not all zero; default all equal. An input of weight zero is
        left out entirely.
    max_iter: steps at most; a handful suffices. tol: radians, the longest tangent step that
        counts as converged.

    Returns the mean, of the promoted dtype and rounded once, and a `KarcherMean` that says how it
    was found. Gradients flow to every input that requires one. Scratch memory is bounded whatever
    N and the size are. Raises `KarcherError` for anything it cannot merge.
    """
    tensors = list(tensors)
    values = [1.0] * len(tensors) if weights is None else [float(w) for w in weights]
    labels = [f"input {index}" for index in range(len(tensors))]
    return merge(tensors, values, max_iter=max_iter, tol=tol, labels=labels, name="the tensor")


def merge(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    max_iter: int,
    tol: float,
    labels: Sequence[str],
    name: str,
) -> tuple[torch.Tensor, KarcherMean]:
    """`karcher_mean` of inputs that have labels, which errors use along with the tensor's name."""
    check_stopping(max_iter, tol)
    check_weights(weights, labels, name)
    taking_part = [index for index, weight in enumerate(weights) if weight > 0]
    chosen = [tensors[index] for index in taking_part]
    chosen_labels = [labels[index] for index in taking_part]
    _check_tensors(chosen, chosen_labels, name)
    merged, mean = _Merge.apply(  # type: ignore[no-untyped-call]
        [weights[index] for index in taking_part],
        max_iter,
        tol,
        chosen_labels,
        name,
        reduce(torch.promote_types, (tensor.dtype for tensor in chosen)),
        *chosen,
    )
    if len(taking_part) < len(tensors):
        coefficients = np.zeros(len(tensors))
        angles = np.full(len(tensors), np.nan)
        coefficients[taking_part] = mean.coefficients
        angles[taking_part] = mean.angles
        mean = replace(mean, coefficients=coefficients, angles=angles)
    return merged, mean


def check_stopping(max_iter: int, tol: float) -> None:
    """Raise unless max_iter is a whole number >= 1 and tol is finite and positive."""
    if not (max_iter >= 1 and max_iter % 1 == 0):
        raise KarcherError(f"max_iter is {max_iter}: give a whole number of 1 or more.")
    if not 0 < tol < math.inf:
        raise KarcherError(f"tol is {tol}: give a positive, finite angle in radians, such as 1e-9.")


def check_weights(weights: Sequence[float], labels: Sequence[str], name: str) -> None:
    """Raise unless there is one weight per input, all finite and >= 0, not all zero."""
    if len(weights) != len(labels):
        raise KarcherError(
            f"{len(weights)} weights were given for {len(labels)} inputs of {name}: "
            "give one weight for each input."
        )
    for weight, label in zip(weights, labels, strict=True):
        if not 0 <= weight < math.inf:
            raise KarcherError(
                f"The weight of {label} for {name} is {weight}: give a finite number of 0 or more."
            )
    if labels and not any(weights):
        raise KarcherError(
            f"All weights for {name} are zero ({', '.join(labels)}): "
            "give at least one input a positive weight."
        )


def _check_tensors(tensors: Sequence[torch.Tensor], labels: Sequence[str], name: str) -> None:
    if not tensors:
        raise KarcherError(f"There is no input for {name}: give at least one tensor.")
    for tensor, label in zip(tensors, labels, strict=True):
        if tensor.dtype not in _DTYPES:
            raise KarcherError(
                f"{name} of {label} is {tensor.dtype}: a Karcher mean needs float16, bfloat16, "
                "float32 or float64; convert it, or copy it from one input instead."
            )
        if tensor.shape != tensors[0].shape:
            raise KarcherError(
                f"{name} of {label} has shape {tuple(tensor.shape)}, but {labels[0]} has "
                f"{tuple(tensors[0].shape)}: give tensors of one shape."
            )
        if tensor.device != tensors[0].device:
            raise KarcherError(
                f"{name} of {label} is on {tensor.device}, but {labels[0]} is on "
                f"{tensors[0].device}: move them to one device."
            )


def _not_finite(tensor: torch.Tensor, label: str, name: str) -> KarcherError:
    flat = tensor.detach().reshape(-1)
    bad = torch.nonzero(~torch.isfinite(flat)).reshape(-1)
    index = int(bad[0])
    place = [int(i) for i in np.unravel_index(index, tensor.shape)]
    return KarcherError(
        f"{name} of {label} is not finite in {len(bad)} of {len(flat)} places, first {flat[index]} "
        f"at {place}: repair or leave out that model, or give it a weight of 0."
    )


class _Merge(torch.autograd.Function):
    """The three passes, with a backward pass that streams as they do."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: list[float],
        max_iter: int,
        tol: float,
        labels: list[str],
        name: str,
        dtype: torch.dtype,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, KarcherMean]:
        values = np.array(weights, dtype=np.float64)
        dtypes = {tensor.dtype for tensor in tensors}

        def solved(*, exact: bool) -> KarcherMean:
            matrix, exponents = gram(tensors, exact=exact)
            for index in np.flatnonzero(~np.isfinite(np.diagonal(matrix))):
                raise _not_finite(tensors[index], labels[index], name)
            return mean_of_gram(matrix, values, exponents, max_iter=max_iter, tol=tol)

        # On an accelerator a second look would be a second synchronisation.
        exact = torch.float64 in dtypes or tensors[0].device.type != "cpu"
        mean = solved(exact=exact)
        if torch.float32 in dtypes and not exact and np.any(mean.angles > _WIDE_ANGLE):
            mean = solved(exact=True)
        ctx.save_for_backward(*tensors)
        ctx.mean, ctx.weights = mean, values
        return combine(tensors, mean.coefficients.tolist(), dtype), mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, _mean: None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        matrix, exponents = gram([*tensors, upstream])
        ahead, among = pull_back(matrix, ctx.weights, exponents, ctx.mean)
        gradients = [
            combine([upstream, *tensors], [ahead[index], *among[index]], tensor.dtype)
            if ctx.needs_input_grad[6 + index]
            else None
            for index, tensor in enumerate(tensors)
        ]
        return (None, None, None, None, None, None, *gradients)
