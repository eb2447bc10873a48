"""What the inputs of one output tensor look like to each other, from the pass that merges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mergekit_karcher.kernels.chords import squared_chord
from mergekit_karcher.kernels.shared_metric import SharedMetric
from mergekit_karcher.means.inputs import Inputs
from mergekit_karcher.means.products import Products
from mergekit_karcher.sphere.pairwise import (
    PairwiseGeometry,
    as_seen_from,
    geometry_of_differences,
    geometry_of_gram,
)
from mergekit_karcher.sphere.trig import Floats

# Inner products in float64 leave a squared chord an error of about 2e-16; below this one, its own
# pass is worth its time.
_CLOSE = 1e-6

# How many values of a tensor are looked at to tell the dtype of its file.
_SAMPLE = 4096

# The root mean square of the relative error that rounding leaves, in units of the largest one:
# measured on normal variates, whatever the dtype.
RMS_ROUNDING = 0.425

# The largest relative error of rounding to a dtype.
ROUNDOFF = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}


@dataclass(frozen=True, eq=False)
class Observation:
    """The M models that one output tensor has inputs of, and how they lie to each other.

    models: names of those with a weight, and last, where the origin is base, of the base.
    weights: (M,), NaN for a base that is the origin.
    origin: what the mean is taken around, "zero" or "base".
    zero: the models as seen from zero.
    base: as seen from the base, which stands at base_index; None where it is not among them.
    roundoffs: (M,) the largest relative rounding error of the values that arrived, by the
        narrowest dtype that holds them: a bfloat16 file stays one when it is cast to float32.
    """

    name: str
    shape: tuple[int, ...]
    models: tuple[str, ...]
    weights: Floats
    origin: str
    zero: PairwiseGeometry
    base: PairwiseGeometry | None
    base_index: int | None
    roundoffs: Floats

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
        weights, roundoffs = np.full(count, np.nan), np.full(count, np.nan)
        weights[places], roundoffs[places] = self.weights, self.roundoffs
        return replace(
            self,
            models=tuple(models),
            weights=weights,
            zero=self.zero.among(places, count),
            base=None if self.base is None else self.base.among(places, count),
            base_index=None if self.base_index is None else int(places[self.base_index]),
            roundoffs=roundoffs,
        )


def observed(
    inputs: Inputs, products: Products, models: Sequence[str], base: str | None
) -> Observation:
    """What the inputs of one output tensor look like to each other.

    Arguments:
        inputs: N of them; borrowed. Read again only where two are too close for their products.
        products: Of the whole tensors (R = 1); of their differences from the base of the inputs if
            they have one, and then with the base itself as the last vector.
        models: The names of the N models.
        base: The name of the base model, whether it takes part in the mean or not.

    Returns:
        An observation that holds no tensor. Its angles are right to seven digits down to 1e-8
        radians.
    """
    tensors, names = list(inputs.tensors), list(models)
    weights = inputs.weights
    gram, exponents = products.grams[0], products.exponents[0]
    if inputs.base is None:
        zero, scale = geometry_of_gram(gram, exponents), np.ones(gram.shape)
    else:
        zero, scale = geometry_of_differences(gram, exponents), _error_scale(gram)
        tensors.append(inputs.base)
        names.append(base or "the base")
        weights = np.append(weights, np.nan)
    base_index = names.index(base) if base in names else None
    zero = _refined(zero, tensors, inputs.shared_metric, _CLOSE * scale)
    return Observation(
        inputs.name,
        tuple(tensors[0].shape),
        tuple(names),
        weights,
        "zero" if inputs.base is None else "base",
        zero,
        None if base_index is None else as_seen_from(zero, base_index),
        base_index,
        np.array([_roundoff(tensor) for tensor in tensors]),
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


def _refined(
    sphere: PairwiseGeometry,
    tensors: Sequence[torch.Tensor],
    metric: SharedMetric | None,
    close: Floats,
) -> PairwiseGeometry:
    """The same geometry, with chords shorter than close measured on the tensors themselves."""
    chords = sphere.chords.copy()
    for i, j in np.argwhere(np.tril(chords < close, -1)):
        norms = (float(sphere.norms[i]), float(sphere.norms[j]))
        chords[i, j] = chords[j, i] = squared_chord(tensors[i], tensors[j], norms, metric)
    return PairwiseGeometry(sphere.norms, chords)


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
