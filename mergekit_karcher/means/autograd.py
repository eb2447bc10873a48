"""The Karcher mean as an operation that gradients flow through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mergekit_karcher.kernels.combine import combine
from mergekit_karcher.means.inputs import Inputs
from mergekit_karcher.means.products import products_of, total
from mergekit_karcher.means.solve import (
    Settings,
    Solution,
    combined,
    is_by_row,
    row_slices,
    solve,
    solve_whole,
)
from mergekit_karcher.sphere.trig import Floats
from mergekit_karcher.sphere.vjp import vjp


def merge(
    inputs: Inputs,
    settings: Settings,
    *,
    with_base: bool = False,
    saved_as: torch.dtype | None = None,
) -> tuple[torch.Tensor, Solution]:
    """The mean of the inputs of one output tensor, new, of the dtype that they promote to.

    Gradients flow to each input that requires one, and to the base. with_base is for a report, and
    adds the base to the products; saved_as is what the result is cast to in the end. Raises
    `KarcherError` if an input is not finite, or the mean beyond the dtype that it is saved in.
    """
    (result,), solution = _applied([inputs], None, settings, with_base, saved_as)
    return result, solution


def merge_whole(
    parts: Sequence[Inputs], settings: Settings, counted: Sequence[bool]
) -> tuple[list[torch.Tensor], Solution]:
    """The mean of N models, each as one vector of all its tensors; one result for each part.

    Parts are the inputs of each output tensor, with the same weights. Of tensors that stand twice
    in a model, one is counted.
    """
    return _applied(parts, counted, settings, False, None)


def _applied(parts: Sequence[Inputs], *options: Any) -> tuple[list[torch.Tensor], Solution]:
    tensors = [tensor for part in parts for tensor in part.all_tensors]
    *results, solution = _Merge.apply(parts, *options, *tensors)  # type: ignore[no-untyped-call]
    return results, solution


class _Merge(torch.autograd.Function):
    """The passes of the mean, and a backward pass in as many.

    Between the two only what autograd saves holds the tensors: it frees them after the backward
    pass, and raises where one of them was changed in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        parts: Sequence[Inputs],
        counted: Sequence[bool] | None,  # None for the inputs of one tensor
        settings: Settings,
        with_base: bool,
        saved_as: torch.dtype | None,
        *tensors: torch.Tensor,
    ) -> tuple[Any, ...]:
        if counted is None:
            solution = solve(parts[0], settings, with_base=with_base)
        else:
            solution = solve_whole(list(itertools.compress(parts, counted)), settings)
        ctx.save_for_backward(*tensors)
        ctx.settings, ctx.counted, ctx.blocks = settings, counted, solution.blocks
        nothing = itertools.repeat(torch.empty(0, device="cpu"))
        ctx.bare = [part.with_tensors(nothing) for part in parts]
        return (*(combined(part, solution.mean, saved_as) for part in parts), solution)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        saved, settings = iter(ctx.saved_tensors), ctx.settings
        parts = [part.with_tensors(saved) for part in ctx.bare]
        extended = [_with_upstream(*pair) for pair in zip(parts, upstream[:-1], strict=True)]
        first, by_row = parts[0], is_by_row(parts[0], settings)
        if ctx.counted is None:
            slices = row_slices(first, settings)
            products = [products_of(extended[0].rows(rows), by_row=by_row) for rows in slices]
        else:
            products = [total([products_of(p) for p in itertools.compress(extended, ctx.counted)])]
        blocks = []
        for block, means in zip(products, ctx.blocks, strict=True):
            of_upstream, of_inputs = vjp(
                block.grams, first.weights, block.exponents, means, settings.magnitude
            )
            blocks.append(np.concatenate([of_inputs, of_upstream[:, :, None]], axis=-1))
        coefficients, needed = np.concatenate(blocks), iter(ctx.needs_input_grad[5:])
        gradients = [
            gradient
            for part, other in zip(parts, extended, strict=True)
            for gradient in _gradients(part, other, coefficients, by_row, needed)
        ]
        return (*[None] * 5, *gradients)


def _with_upstream(part: Inputs, gradient: torch.Tensor) -> Inputs:
    """The inputs as seen from the base, with the upstream gradient v as one more.

    In a metric that is G^-1 v, whose inner products with the inputs are those of v without one, to
    within a factor of G that `_gradient` takes back.
    """
    tensors = list(part.tensors)
    if part.base is not None:
        tensors = [tensor.double() - part.base.double() for tensor in tensors]
    if part.shared_metric is not None:
        gradient = gradient.double() / part.shared_metric.dense(gradient)
    labels = (*part.labels, "the upstream gradient")
    return replace(part, tensors=(*tensors, gradient), labels=labels, base=None)


def _gradients(
    part: Inputs, extended: Inputs, coefficients: Floats, by_row: bool, needed: Iterator[bool]
) -> Iterator[torch.Tensor | None]:
    """The gradients of `all_tensors` of one part.

    coefficients: (R, N, N + 1), of each input over the inputs and the upstream gradient.
    """
    # What moves the base moves all differences the other way.
    rest = -coefficients.sum(1)
    rest[:, -1] += 1
    of_tensors = [*coefficients.transpose(1, 0, 2), *([] if part.base is None else [rest])]
    for tensor, over in itertools.zip_longest(part.all_tensors, of_tensors):
        # The tensors of a metric, which come last, have none.
        if not next(needed) or over is None:
            yield None
        else:
            yield _gradient(extended, over if by_row else over[0], tensor.dtype)


def _gradient(extended: Inputs, coefficients: Floats, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of one input, from its coefficients over the inputs and the upstream."""
    if extended.shared_metric is None:
        return combine(extended.tensors, coefficients, dtype)
    gradient = combine(extended.tensors, coefficients, torch.float64)
    return gradient.mul_(extended.shared_metric.dense(gradient)).to(dtype)
