"""Karcher means of inputs: from their inner products to coefficients, and to outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.kernels.combine import combine
from mergekit_karcher.kernels.gram import Precision
from mergekit_karcher.means.finite import check_result
from mergekit_karcher.means.inputs import Inputs
from mergekit_karcher.means.precision import (
    double_suffices,
    single_products,
    single_suffices,
    starting_precision,
)
from mergekit_karcher.means.products import Products, products_of, total
from mergekit_karcher.means.result import KarcherMean, over_rows
from mergekit_karcher.sphere.magnitude import Magnitude
from mergekit_karcher.sphere.results import SphereMeans
from mergekit_karcher.sphere.solver import solve_means
from mergekit_karcher.sphere.trig import Floats

MAX_ITER = 100
TOL = 1e-12

# Gram matrix elements of the rows that are solved together: about 20 MB with all that is derived.
_ROW_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Settings:
    """How to take a mean; see `karcher_mean`. Raises `KarcherError` for a wrong max_iter or tol.

    for_output: the mean of one tensor need be no more exact than its output tensor shows.
    """

    granularity: Literal["tensor", "row", "model"] = "tensor"
    magnitude: Magnitude = Magnitude.ARITHMETIC
    max_iter: int = MAX_ITER
    tol: float = TOL
    for_output: bool = False

    def __post_init__(self) -> None:
        check_stopping(self.max_iter, self.tol)


@dataclass(frozen=True, eq=False)
class Solution:
    """The mean of inputs, before they are combined."""

    mean: KarcherMean  # of all rows together
    blocks: tuple[SphereMeans, ...]  # of the rows that were solved together, as in `row_slices`
    # Those of the inputs, all rows together, with the base as the last vector if it was asked for;
    # empty for a whole model.
    products: tuple[Products, ...]


def check_stopping(max_iter: int, tol: float) -> None:
    """Raise `KarcherError` unless max_iter is a whole number >= 1 and tol finite and positive."""
    if not (max_iter >= 1 and max_iter % 1 == 0):
        raise KarcherError(f"max_iter is {max_iter}: give a whole number of 1 or more.")
    if not 0 < tol < math.inf:
        raise KarcherError(f"tol is {tol}: give a positive, finite angle in radians, such as 1e-9.")


def solve(inputs: Inputs, settings: Settings, *, with_base: bool = False) -> Solution:
    """The mean of the inputs of one output tensor, as one vector each or row by row.

    Scratch memory is bounded, but for N coefficients a row. Raises `KarcherError` if an input is
    not finite.
    """
    count, by_row = len(inputs.tensors), is_by_row(inputs, settings)
    # One array for the coefficients of all rows: with many of them, two would be felt.
    coefficients = np.empty((inputs.tensors[0].shape[0] if by_row else 1, count))
    blocks, lengths, kept = [], [], []
    for rows in row_slices(inputs, settings):
        products, means = _solve_block(inputs.rows(rows), settings, by_row, with_base)
        lengths.append(_lengths(products.of(slice(count)), means.coefficients))
        kept.append(products.over_rows())
        coefficients[rows] = means.coefficients
        # The largest of the rows is all that is told of their angles.
        angles = np.fmax.reduce(means.angles, axis=0, keepdims=True)
        blocks.append(replace(means, angles=angles, coefficients=coefficients[rows]))
    mean = over_rows(blocks, coefficients if by_row else coefficients[0], lengths)
    return Solution(mean, tuple(blocks), (total(kept),))


def solve_whole(parts: Sequence[Inputs], settings: Settings) -> Solution:
    """The mean of N vectors that consist of the inputs of several output tensors.

    Parts are the inputs of each tensor, N with the same weights in each. A tensor that stands twice
    in a model, such as tied weights, must be here once.
    """
    products = total([products_of(p, precision=starting_precision(p)) for p in parts])
    return _solve_whole_products(products, parts[0].weights, settings)


def mean_of_products(products: Products, weights: Floats, settings: Settings) -> KarcherMean:
    """The mean of N vectors from their inner products (R = 1); weights (N,) > 0, of any sum."""
    return _solve_whole_products(products, weights, settings).mean


def _solve_whole_products(products: Products, weights: Floats, settings: Settings) -> Solution:
    means = _solve_products(products, weights, settings)
    lengths = [_lengths(products, means.coefficients)]
    return Solution(over_rows([means], means.coefficients[0], lengths), (means,), ())


def _solve_products(products: Products, weights: Floats, settings: Settings) -> SphereMeans:
    return solve_means(
        products.grams,
        weights,
        products.exponents,
        magnitude=settings.magnitude,
        max_iter=settings.max_iter,
        tol=settings.tol,
    )


def combined(
    inputs: Inputs, mean: KarcherMean, saved_as: torch.dtype | None = None
) -> torch.Tensor:
    """The output tensor, new, of the dtype that all inputs promote to; one pass over them.

    mean: theirs, or that of the larger vectors that they are part of. Raises `KarcherError` if a
    value is beyond the dtype saved_as, which the result is cast to in the end.
    """
    # The mean of one is that one; the base would only round it.
    alone = len(inputs.tensors) == 1 and bool((mean.coefficients == 1).all())
    base = None if alone else inputs.base
    result = combine(inputs.tensors, mean.coefficients, inputs.dtype, base=base)
    length = mean.length if inputs.shared_metric is None else None
    check_result(result, inputs, saved_as or result.dtype, length)
    return result


def is_by_row(inputs: Inputs, settings: Settings) -> bool:
    """Whether each row of the inputs is a vector of its own."""
    first = inputs.tensors[0]
    return settings.granularity == "row" and first.ndim > 1 and first.numel() > 0


def row_slices(inputs: Inputs, settings: Settings) -> list[slice]:
    """The rows of inputs that are solved together; one slice of all where rows are no vectors."""
    if not is_by_row(inputs, settings):
        return [slice(None)]
    rows = inputs.tensors[0].shape[0]
    step = max(1, _ROW_ELEMENTS // (len(inputs.tensors) + 1) ** 2)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _solve_block(
    block: Inputs, settings: Settings, by_row: bool, with_base: bool
) -> tuple[Products, SphereMeans]:
    if settings.for_output and not with_base:
        single = single_products(block, by_row)
        if single is not None:
            means = _solve_products(single[0], block.weights, settings)
            if single_suffices(means, single[1], block.dtype):
                return single[0], means
    precision = starting_precision(block)
    while True:
        products = products_of(block, with_base=with_base, by_row=by_row, precision=precision)
        vectors = products.of(slice(len(block.tensors)))
        means = _solve_products(vectors, block.weights, settings)
        if precision is Precision.EXACT or double_suffices(block, means):
            return products, means
        precision = Precision.EXACT


def _lengths(products: Products, coefficients: Floats) -> Floats:
    """|sum_i k_i W_i| for each of R sums, (R,)."""
    largest = products.exponents.max(-1)
    scaled = np.ldexp(coefficients, products.exponents - largest[:, None])
    squares = ((products.grams @ scaled[:, :, None])[:, :, 0] * scaled).sum(-1)
    lengths: Floats = np.ldexp(np.sqrt(np.maximum(squares, 0)), largest)
    return lengths
