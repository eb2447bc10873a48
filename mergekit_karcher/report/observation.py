"""What the inputs of one output tensor look like to each other, from the pass that merges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_karcher.kernels.chords import squared_chord
from mergekit_karcher.means.inputs import Inputs
from mergekit_karcher.means.products import Products
from mergekit_karcher.sphere.pairwise import (
    PairwiseGeometry,
    as_seen_from,
    geometry_of_differences,
    geometry_of_gram,
)
from mergekit_karcher.sphere.trig import Floats

# Inner products in float64 leave a squared chord an error of about 2e-16: one below this is worth a
# pass of its own.
_CLOSE = 1e-6

# How many values of a tensor are looked at to tell the dtype of its file.
_SAMPLE = 4096

# The root mean square of the relative error that rounding leaves, in units of the largest one:
# measured on normal variates, whatever the dtype.
RMS_ROUNDING = 0.425

# The largest relative error of rounding to a dtype.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in _DTYPES}


@dataclass(frozen=True, eq=False)
class Observation:
    """The M models that one output tensor has inputs of, and how they lie to each other.

    models: names of those with a weight, and last, where the origin is base, of the base.
    weights: (M,), NaN for a base that is the origin.
    origin: what the mean is taken around, "zero" or "base".
    zero: the models as seen from zero.
    base: as seen from the base; None where it is not among them.
    roundoffs: (M,) the largest relative rounding error of the values that arrived, by the
        narrowest dtype that holds them: a bfloat16 file stays one when it is cast to float32.
    input_products: (M, M) `kernels.overlap.input_products`, NaN for models without a change; None
        where the tensor is no linear layer or has no base.
    """

    name: str
    shape: tuple[int, ...]
    models: tuple[str, ...]
    weights: Floats
    origin: str
    zero: PairwiseGeometry
    base: PairwiseGeometry | None
    roundoffs: Floats
    input_products: Floats | None = None

    def view(self, origin: str) -> PairwiseGeometry | None:
        """The models as seen from that origin; None where there is no base."""
        return self.zero if origin == "zero" else self.base

    @property
    def sphere(self) -> PairwiseGeometry:
        """The models as seen from the origin that the mean is taken around."""
        view = self.view(self.origin)
        if view is None:
            raise ValueError(f"{self.name} has origin: base, and no view from the base.")
        return view

    def among(self, models: Sequence[str]) -> Observation:
        """The same over all models of a merge, with NaN for those that have no input here."""
        places = np.array([models.index(model) for model in self.models])
        count = len(models)
        weights, roundoffs = np.full((2, count), np.nan)
        weights[places], roundoffs[places] = self.weights, self.roundoffs
        products = self.input_products
        return replace(
            self,
            models=tuple(models),
            weights=weights,
            zero=self.zero.among(places, count),
            base=None if self.base is None else self.base.among(places, count),
            roundoffs=roundoffs,
            input_products=None if products is None else _placed(products, places, count),
        )


def _placed(matrix: Floats, places: Sequence[int] | NDArray[np.intp], count: int) -> Floats:
    """The entries of a matrix at other places of one of that count, NaN elsewhere."""
    result = np.full((count, count), np.nan)
    result[np.ix_(np.asarray(places), np.asarray(places))] = matrix
    return result


def observed(
    inputs: Inputs,
    products: Products,
    models: Sequence[str],
    base: str | None,
    input_products: Floats | None = None,
) -> Observation:
    """What the inputs of one output tensor, borrowed, look like to each other.

    products: of the whole tensors (R = 1); where the inputs have a base, of their differences from
    it and last of the base itself. models: the names of the N inputs. base: that of the base model,
    whether it takes part in the mean or not. input_products: of the N inputs, as in `Observation`.
    Angles are right to seven digits down to 1e-8 radians; for that, inputs too close for their
    products are read again.
    """
    tensors, names, weights = list(inputs.tensors), list(models), inputs.weights
    gram, exponents = products.grams[0], products.exponents[0]
    if inputs.base is None:
        zero, scale = geometry_of_gram(gram, exponents), np.ones(gram.shape)
    else:
        zero, scale = geometry_of_differences(gram, exponents), _error_scale(gram)
        tensors.append(inputs.base)
        names.append(base or "the base")
        weights = np.append(weights, np.nan)
    chords, metric = zero.chords.copy(), inputs.shared_metric
    for i, j in np.argwhere(np.tril(chords < _CLOSE * scale, -1)):
        norms = (float(zero.norms[i]), float(zero.norms[j]))
        chords[i, j] = chords[j, i] = squared_chord(tensors[i], tensors[j], norms, metric)
    zero = PairwiseGeometry(zero.norms, chords)
    return Observation(
        inputs.name,
        tuple(tensors[0].shape),
        tuple(names),
        weights,
        "zero" if inputs.base is None else "base",
        zero,
        as_seen_from(zero, names.index(base)) if base in names else None,
        np.array([_roundoff(tensor) for tensor in tensors]),
        None
        if input_products is None
        else _placed(input_products, range(len(models)), len(tensors)),
    )


def _error_scale(gram: Floats) -> Floats:
    """The errors of chords that come from differences, (N + 1, N + 1), in units of those from zero.

    Two differences are as exact as they are long; so are the angles that they span.
    """
    lengths = np.sqrt(np.diagonal(gram)).astype(np.float64)
    lengths[-1] = 0
    length = float(np.sqrt(gram[-1, -1]))
    longer = np.maximum(lengths[:, None], lengths)
    return (longer / length) ** 2 if length > 0 else np.zeros(longer.shape)


def _roundoff(tensor: torch.Tensor) -> float:
    """The largest rounding error of the narrowest dtype in which a sample of values is exact."""
    part = tensor.detach()
    while part.ndim > 1 and part.numel() > _SAMPLE:
        part = part[len(part) // 2]
    part = part.reshape(-1)[:_SAMPLE]
    for dtype, roundoff in ROUNDOFF.items():
        if dtype is tensor.dtype or bool((part.to(dtype).to(tensor.dtype) == part).all()):
            return roundoff
    return ROUNDOFF[torch.float64]
