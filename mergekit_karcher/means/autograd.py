"""The Karcher mean as an operation that gradients flow through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from mergekit_karcher.kernels.combine import combine
from mergekit_karcher.means.inputs import Inputs
from mergekit_karcher.means.products import Products, products_of, total
from mergekit_karcher.means.solve import (
    Settings,
    Solution,
    combined,
    is_by_row,
    row_slices,
    solve,
    solve_whole,
)
from mergekit_karcher.sphere.results import SphereMeans
from mergekit_karcher.sphere.trig import Floats
from mergekit_karcher.sphere.vjp import vjp


def merge(
    inputs: Inputs,
    settings: Settings,
    *,
    keep_products: bool = False,
    saved_as: torch.dtype | None = None,
) -> tuple[torch.Tensor, Solution]:
    """The mean of the inputs of one output tensor, and what is known of it.

    Arguments:
        inputs: N of them; borrowed. Gradients flow to each that requires one, and to the base.
        settings: With granularity "tensor" or "row".
        keep_products: Whether to keep their inner products, for a report.
        saved_as: The dtype that the result is cast to in the end; by default its own.

    Returns:
        A new tensor of the dtype that all inputs promote to, and the solution.

    Raises:
        KarcherError: If an input is not finite, or the mean beyond the dtype that it is saved in.
    """
    (result,), solution = _applied([inputs], _Options(settings, None, keep_products, saved_as))
    return result, solution


def merge_whole(
    parts: Sequence[Inputs], settings: Settings, counted: Sequence[bool]
) -> tuple[list[torch.Tensor], Solution]:
    """The mean of N models, each as one vector of all its tensors.

    Arguments:
        parts: The inputs of each output tensor, N with the same weights in each.
        settings: With granularity "model".
        counted: Whether each part counts: of tensors that stand twice in a model, one does.

    Returns:
        One tensor for each part, as by `merge`, and the solution.
    """
    return _applied(parts, _Options(settings, counted, False, None))


class _Options(NamedTuple):
    """How to merge; counted is None for the inputs of one tensor."""

    settings: Settings
    counted: Sequence[bool] | None
    keep_products: bool
    saved_as: torch.dtype | None


def _applied(parts: Sequence[Inputs], options: _Options) -> tuple[list[torch.Tensor], Solution]:
    tensors = [tensor for part in parts for tensor in _tensors_of(part)]
    *results, solution = _Merge.apply(parts, options, *tensors)  # type: ignore[no-untyped-call]
    return results, solution


class _Merge(torch.autograd.Function):
    """The passes of the mean, and a backward pass in as many.

    Between the two only what autograd saves holds the tensors: it frees them after the backward
    pass, and raises where one of them was changed in place.
    """

    @staticmethod
    def forward(
        ctx: Any, parts: Sequence[Inputs], options: _Options, *tensors: torch.Tensor
    ) -> tuple[Any, ...]:
        settings, counted, keep_products, saved_as = options
        if counted is None:
            solution = solve(parts[0], settings, keep_products=keep_products)
        else:
            counting = [part for part, counts in zip(parts, counted, strict=True) if counts]
            solution = solve_whole(counting, settings)
        ctx.save_for_backward(*tensors)
        ctx.settings, ctx.counted, ctx.blocks = settings, counted, solution.blocks
        ctx.without_tensors = [_without_tensors(part) for part in parts]
        return (*(combined(part, solution.mean, saved_as) for part in parts), solution)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        parts = [_with_tensors(part, saved) for part in ctx.without_tensors]
        extended = [
            _with_upstream(part, gradient)
            for part, gradient in zip(parts, upstream[:-1], strict=True)
        ]
        if ctx.counted is None:
            by_row = is_by_row(parts[0], ctx.settings)
            slices = row_slices(parts[0], ctx.settings)
            products = [products_of(extended[0].rows(rows), by_row=by_row) for rows in slices]
            pairs = zip(products, ctx.blocks, strict=True)
            blocks = [_pulled_back(p, parts[0], means, ctx.settings) for p, means in pairs]
        else:
            counting = zip(extended, ctx.counted, strict=True)
            whole = total([products_of(part) for part, counts in counting if counts])
            blocks = [_pulled_back(whole, parts[0], ctx.blocks[0], ctx.settings)]
        coefficients = np.concatenate(blocks)
        needed = iter(ctx.needs_input_grad[2:])
        gradients = [
            gradient
            for part, other in zip(parts, extended, strict=True)
            for gradient in _gradients(part, other, coefficients, ctx.settings, needed)
        ]
        return (None, None, *gradients)


def _tensors_of(part: Inputs) -> list[torch.Tensor]:
    """All tensors that inputs hold: their own, the base, and those of the shared metric."""
    base = [] if part.base is None else [part.base]
    metric = [] if part.shared_metric is None else part.shared_metric.tensors
    return [*part.tensors, *base, *metric]


def _without_tensors(part: Inputs) -> tuple[Inputs, int, bool, int]:
    """Inputs that hold no tensor, and how many there were of each kind."""
    metric = part.shared_metric
    bare = replace(
        part,
        tensors=(),
        base=None,
        metrics=None,
        shared_metric=None if metric is None else metric._replace(tensors=[]),
    )
    count = 0 if metric is None else len(metric.tensors)
    return bare, len(part.tensors), part.base is not None, count


def _with_tensors(bare: tuple[Inputs, int, bool, int], saved: Iterator[torch.Tensor]) -> Inputs:
    """The inputs that `_without_tensors` was given, from their saved tensors."""
    part, count, has_base, in_metric = bare
    tensors = tuple(next(saved) for _ in range(count))
    base = next(saved) if has_base else None
    metric = part.shared_metric
    if metric is not None:
        metric = metric._replace(tensors=[next(saved) for _ in range(in_metric)])
    return replace(part, tensors=tensors, base=base, shared_metric=metric)


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


def _pulled_back(
    products: Products, part: Inputs, means: SphereMeans, settings: Settings
) -> Floats:
    """What `vjp` says of each input, (R, N, N + 1) over the inputs and the upstream gradient."""
    upstream, inputs = vjp(
        products.grams, part.weights, products.exponents, means, settings.magnitude
    )
    return np.concatenate([inputs, upstream[:, :, None]], axis=-1)


def _gradients(
    part: Inputs,
    extended: Inputs,
    coefficients: Floats,
    settings: Settings,
    needed: Iterator[bool],
) -> Iterator[torch.Tensor | None]:
    """The gradients of all tensors of one part, in the order of `_tensors_of`."""
    by_row = is_by_row(part, settings)
    for index, tensor in enumerate(part.tensors):
        of_input = coefficients[:, index] if by_row else coefficients[0, index]
        yield _gradient(extended, of_input, tensor.dtype) if next(needed) else None
    if part.base is not None:
        # What moves the base moves all differences the other way.
        rest = -coefficients.sum(1)
        rest[:, -1] += 1
        of_base = rest if by_row else rest[0]
        yield _gradient(extended, of_base, part.base.dtype) if next(needed) else None
    for _ in () if part.shared_metric is None else part.shared_metric.tensors:
        next(needed)
        yield None


def _gradient(extended: Inputs, coefficients: Floats, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of one input, from its coefficients over the inputs and the upstream."""
    if extended.shared_metric is None:
        return combine(extended.tensors, coefficients, dtype)
    gradient = combine(extended.tensors, coefficients, torch.float64)
    return gradient.mul_(extended.shared_metric.dense(gradient)).to(dtype)
