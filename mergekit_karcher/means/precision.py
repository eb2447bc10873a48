"""How exact the inner products of inputs must be for what is made of them."""

from __future__ import annotations

import math

import numpy as np
import torch

from mergekit_karcher.kernels.gram import SINGLE_ERROR, Precision
from mergekit_karcher.means.inputs import Inputs
from mergekit_karcher.means.products import Products, products_of
from mergekit_karcher.sphere.pairwise import geometry_of_gram
from mergekit_karcher.sphere.results import SphereMeans, Status
from mergekit_karcher.sphere.rounding import coefficient_error

# Above this angle to the mean (radians), rounding errors of a Gram matrix are amplified more than
# 35 times, and float32 inputs on the CPU get an exact one after all. N orthogonal inputs are there
# from N = 35 on.
_WIDE_ANGLE = 1.4

# Nearer inputs (radians) get float64 products: float32 ones, which were seen to be off by 6e-7,
# would show angles between them that are wrong by more than one percent.
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


def single_is_worth_trying(inputs: Inputs) -> bool:
    """Whether float32 products of inputs are likely to do for an output tensor.

    Costs a pass over a small part of 16-bit inputs, and nothing for others.
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
        return False
    rows = max(1, math.ceil(_SAMPLE * len(first) / first.numel()))
    return not _any_near(products_of(inputs.rows(slice(0, rows))))


def in_range(products: Products, size: int) -> bool:
    """Whether float32 held the products of vectors that together have that many elements."""
    squares = np.diagonal(products.grams, axis1=1, axis2=2)
    return bool(np.all((squares > size * _LEAST_SQUARE) & np.isfinite(squares)))


def single_suffices(products: Products, means: SphereMeans, dtype: torch.dtype) -> bool:
    """Whether an output of that dtype is off by no more than one unit in the last place.

    products: in float32. means: theirs.
    """
    if np.any(means.statuses != Status.CONVERGED) or not means.unique.all():
        return False
    error = coefficient_error(means.angles, SINGLE_ERROR)
    return bool(error.max() <= _SHOWN * torch.finfo(dtype).eps) and not _any_near(products)


def double_suffices(inputs: Inputs, means: SphereMeans) -> bool:
    """Whether the coefficients of a mean of float64 products are as exact as float64 itself."""
    single = any(tensor.dtype == torch.float32 for tensor in inputs.tensors)
    return not single or not np.any(means.angles > _WIDE_ANGLE)


def _any_near(products: Products) -> bool:
    """Whether two vectors, all rows together, are too near for float32, or one has no length."""
    whole = products.over_rows()
    angles = geometry_of_gram(whole.grams[0], whole.exponents[0]).angles
    pairs = angles[np.tril_indices(len(angles), -1)]
    return not np.all(pairs > _NEAR)
