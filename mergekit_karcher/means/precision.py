"""How exact the inner products of inputs must be for what is made of them."""

from __future__ import annotations

import math

import numpy as np
import torch

from mergekit_karcher.kernels.gram import SINGLE_ERROR, Precision, grams
from mergekit_karcher.means.inputs import Inputs
from mergekit_karcher.means.products import Products, products_of
from mergekit_karcher.sphere.pairwise import geometry_of_gram
from mergekit_karcher.sphere.results import SphereMeans, Status
from mergekit_karcher.sphere.rounding import coefficient_error
from mergekit_karcher.sphere.trig import Floats

# Above this angle to the mean (radians), rounding errors of a Gram matrix are amplified more than
# 35 times, and float32 inputs on the CPU get an exact one after all. N orthogonal inputs are there
# from N = 35 on.
_WIDE_ANGLE = 1.4

# Inputs that differ from the first by less than that part of its length are multiplied as what they
# differ by, which keeps the angles between them.
_SMALL_DIFFERENCE = 0.1

# Two others that are nearer than that (radians) get float64 products: float32 ones, which were seen
# to be off by 6e-7, would show angles between them that are wrong by more than one percent.
_NEAR = 0.01

# Elements from which the angles are guessed; tensors that are no larger get float64 products.
_SAMPLE = 1 << 16

# The relative error of the coefficients that an output may show, in units of its last place. Half
# a unit more is the rounding of the output itself.
_SHOWN = 0.25

# A squared length an element from which on float32 loses nothing that counts to its smallest
# product, 2^-126.
_LEAST_SQUARE = 2.0**-90

_HALF = (torch.float16, torch.bfloat16)


def starting_precision(inputs: Inputs) -> Precision:
    """That of the first inner products of inputs, where coefficients are to be exact.

    float64 inputs have EXACT ones at once, and so has an accelerator: a second pass, at wide
    angles, would be a second synchronisation.
    """
    on_accelerator = inputs.tensors[0].device.type != "cpu"
    exact = on_accelerator or any(tensor.dtype == torch.float64 for tensor in inputs.tensors)
    return Precision.EXACT if exact else Precision.DOUBLE


def single_products(inputs: Inputs, by_row: bool) -> tuple[Products, Floats] | None:
    """The inner products of 16-bit inputs in float32, where that may do for an output tensor.

    And a bound on the error of each <W_ri, W_rj>, as a part of |W_ri| |W_rj|, (R,). None where
    float64 is needed. Which it is, a pass over a small part of the inputs tells first.
    """
    first = inputs.tensors[0]
    if (
        first.device.type != "cpu"
        or inputs.dtype not in _HALF
        or inputs.shared_metric is not None
        or first.numel() <= _SAMPLE
        # Otherwise torch may take products of even fewer bits.
        or torch.get_float32_matmul_precision() != "highest"
    ):
        return None
    rows = max(1, math.ceil(_SAMPLE * len(first) / first.numel()))
    sample = products_of(inputs.rows(slice(0, rows))).over_rows()
    if inputs.base is None and _differ_little(sample):
        products, errors = _products_by_difference(inputs, by_row)
    elif not _any_near(sample):
        products = products_of(inputs, by_row=by_row, precision=Precision.SINGLE)
        errors = np.full(len(products.grams), SINGLE_ERROR)
        if _any_near(products.over_rows()):
            return None
    else:
        return None
    squares = np.diagonal(products.grams, axis1=1, axis2=2)
    in_range = (squares > first.numel() * _LEAST_SQUARE) & np.isfinite(squares)
    return (products, errors) if in_range.all() else None


def single_suffices(means: SphereMeans, errors: Floats, dtype: torch.dtype) -> bool:
    """Whether an output of that dtype is off by no more than one unit in the last place.

    means: those of float32 products with such errors, (R,).
    """
    if np.any(means.statuses != Status.CONVERGED) or not means.unique.all():
        return False
    error = coefficient_error(means.angles, errors)
    return bool(error.max() <= _SHOWN * torch.finfo(dtype).eps)


def double_suffices(inputs: Inputs, means: SphereMeans) -> bool:
    """Whether the coefficients of a mean of float64 products are as exact as float64 itself."""
    single = any(tensor.dtype == torch.float32 for tensor in inputs.tensors)
    return not single or not np.any(means.angles > _WIDE_ANGLE)


def _products_by_difference(inputs: Inputs, by_row: bool) -> tuple[Products, Floats]:
    """Float32 products of inputs W_i = W_0 + d_i, from those of W_0 and the d_i, and their errors.

    Those of the parts are off by SINGLE_ERROR of their lengths.
    """
    origin, *others = inputs.tensors
    parts, exponents = grams(
        others, base=origin, with_base=True, by_row=by_row, precision=Precision.SINGLE
    )
    count = len(inputs.tensors)
    sums = np.zeros((count, count), np.longdouble)  # of the parts, W_0 last, that each input is
    sums[:, -1] = 1
    sums[1:, :-1] = np.eye(count - 1)
    # Infinite and NaN entries, which float64 will tell of, and inputs of no length.
    with np.errstate(divide="ignore", invalid="ignore"):
        products = sums @ parts @ sums.T
        lengths = np.sqrt(np.diagonal(parts, axis1=1, axis2=2))
        growth = (lengths @ sums.T) ** 2 / np.diagonal(products, axis1=1, axis2=2)
    return Products(products, exponents), SINGLE_ERROR * growth.max(-1)


def _differ_little(products: Products) -> bool:
    """Whether all vectors (R = 1) are the first and little more."""
    geometry = geometry_of_gram(products.grams[0], products.exponents[0])
    norms = geometry.norms
    squares = norms * norms[0] * geometry.chords[0] + (norms - norms[0]) ** 2
    return len(norms) > 1 and bool(np.all(squares < (_SMALL_DIFFERENCE * norms[0]) ** 2))


def _any_near(products: Products) -> bool:
    """Whether two vectors (R = 1) are too near for float32, or one has no length."""
    angles = geometry_of_gram(products.grams[0], products.exponents[0]).angles
    pairs = angles[np.tril_indices(len(angles), -1)]
    return not np.all(pairs > _NEAR)
