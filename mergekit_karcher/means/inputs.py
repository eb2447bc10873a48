"""The inputs of one output tensor, checked once, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.kernels.shared_metric import SharedMetric
from mergekit_karcher.means.input_gram import InputGram
from mergekit_karcher.means.metric import DTYPES, DiagonalMetric, checked_metric, shared_metric
from mergekit_karcher.sphere.trig import Floats


@dataclass(frozen=True, eq=False)
class Inputs:
    """The N >= 1 inputs of one output tensor that have a weight; made by `checked_inputs`.

    All tensors are borrowed, floating, of one shape and device and any strides.
    """

    name: str  # of the output tensor, for messages
    tensors: tuple[torch.Tensor, ...]
    labels: tuple[str, ...]  # the model that each is of, for messages
    weights: Floats  # (N,) float64, positive and finite, of any sum
    places: tuple[int, ...]  # where each stood among all that were given
    base: torch.Tensor | None = None  # what the mean is taken around; None for zero
    # None if no model has one; in it, None for one that is the same everywhere.
    metrics: tuple[DiagonalMetric | None, ...] | None = None
    grams: tuple[InputGram, ...] | None = None  # instead of those, of linear layers
    shared_metric: SharedMetric | None = None  # what lengths and angles are measured in

    @property
    def dtype(self) -> torch.dtype:
        """What the dtypes of all tensors promote to; that of the output."""
        read = [*self.tensors, *(() if self.base is None else (self.base,))]
        dtype: torch.dtype = reduce(torch.promote_types, (tensor.dtype for tensor in read))
        return dtype

    @property
    def all_tensors(self) -> list[torch.Tensor]:
        """The tensors, the base, and those of the shared metric."""
        base = [] if self.base is None else [self.base]
        shared = [] if self.shared_metric is None else self.shared_metric.tensors
        return [*self.tensors, *base, *shared]

    def with_tensors(self, given: Iterator[torch.Tensor]) -> Inputs:
        """The same inputs with others in place of `all_tensors`; without the models' metrics."""
        shared = self.shared_metric
        return replace(
            self,
            tensors=tuple(next(given) for _ in self.tensors),
            base=None if self.base is None else next(given),
            metrics=None,
            shared_metric=shared and shared._replace(tensors=[next(given) for _ in shared.tensors]),
        )

    def rows(self, rows: slice) -> Inputs:
        """The same inputs at some indices of their first axis, as views."""
        if rows == slice(None):
            return self
        return self.with_tensors(tensor[rows] for tensor in self.all_tensors)

    def sharing_a_metric(self, floor: float, *, always: bool = False) -> Inputs:
        """The same inputs, with lengths and angles in the metric that their models share.

        always: also in one that is the same for every element. By itself it changes no mean; in a
        part of larger vectors it weighs that part against the others.
        """
        if self.grams is not None:
            raise KarcherError(
                f"{self.name} has input Grams, which a Karcher mean has no use for: give diagonal "
                "metrics, or take the Fisher mean."
            )
        if self.metrics is None:
            return self
        shared = shared_metric(self.metrics, self.weights.tolist(), floor)
        return replace(self, shared_metric=shared if shared.tensors or always else None)

    @property
    def metrics_are_zero(self) -> bool:
        """Whether there are metrics, and all of them are zero everywhere."""
        if self.grams is not None:
            return all(gram.trace() == 0 for gram in self.grams)
        return self.metrics is not None and all(m is not None and m.mean == 0 for m in self.metrics)


def checked_inputs(
    name: str,
    tensors: Sequence[torch.Tensor],
    labels: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    *,
    base: torch.Tensor | None = None,
    metrics: Sequence[torch.Tensor | InputGram | None] | None = None,
) -> Inputs:
    """The inputs that have a weight, or a `KarcherError` that says which cannot be merged, and why.

    Those of weight zero may hold anything, of any shape; by default all weights are equal. Each
    metric costs a pass over it; None is one that is the same everywhere. All are of one kind.
    """
    labels = labels or [f"input {index}" for index in range(len(tensors))]
    weights = [1.0] * len(tensors) if weights is None else [float(weight) for weight in weights]
    check_weights(weights, labels, name)
    places = tuple(place for place, weight in enumerate(weights) if weight > 0)
    if metrics is not None and len(metrics) != len(tensors):
        raise KarcherError(f"{name} needs one metric for each of {len(tensors)} tensors.")
    inputs = Inputs(
        name,
        tuple(tensors[place] for place in places),
        tuple(labels[place] for place in places),
        np.array([weights[place] for place in places], dtype=np.float64),
        places,
        base,
    )
    _check_tensors(inputs)
    if metrics is None:
        return inputs
    given = [metrics[place] for place in places]
    if any(isinstance(metric, InputGram) for metric in given):
        return replace(inputs, grams=tuple(_checked_grams(inputs, given)))
    return replace(inputs, metrics=tuple(_checked_metrics(inputs, given)))


def _checked_metrics(inputs: Inputs, metrics: Sequence[Any]) -> Iterator[DiagonalMetric | None]:
    for values, tensor, label in zip(metrics, inputs.tensors, inputs.labels, strict=True):
        yield None if values is None else checked_metric(values, tensor, label, inputs.name)


def _checked_grams(inputs: Inputs, metrics: Sequence[Any]) -> Iterator[InputGram]:
    for gram, tensor, label in zip(metrics, inputs.tensors, inputs.labels, strict=True):
        if not isinstance(gram, InputGram):
            raise KarcherError(
                f"{inputs.name} has an input Gram for one model and none for {label}, whose scales "
                "have nothing to do with each other: give all models metrics of one kind."
            )
        width = tensor[0].numel() if tensor.ndim > 3 else tensor.shape[-1]
        expected = (*(tensor.shape[:1] if tensor.ndim == 3 else ()), width, width)
        if gram.shape != expected:
            raise KarcherError(
                f"The input Gram of {inputs.name} for {label} has shape {gram.shape}, but the "
                f"tensor, {tuple(tensor.shape)}, needs {expected}: make it anew from that model."
            )
        if not gram.is_finite():
            raise KarcherError(
                f"The input Gram of {inputs.name} for {label} is not finite everywhere: make it "
                "anew."
            )
        yield gram


def check_weights(weights: Sequence[float], labels: Sequence[str], name: str) -> None:
    """Raise `KarcherError` unless each input has a finite weight >= 0, and not all are zero."""
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
    if not labels:
        raise KarcherError(f"There is no input for {name}: give at least one tensor.")
    if not any(weights):
        raise KarcherError(
            f"All weights for {name} are zero ({', '.join(labels)}): "
            "give at least one input a positive weight."
        )


def _check_tensors(inputs: Inputs) -> None:
    first, first_label, name = inputs.tensors[0], inputs.labels[0], inputs.name
    base = [] if inputs.base is None else [(inputs.base, "the base")]
    for tensor, label in [*zip(inputs.tensors, inputs.labels, strict=True), *base]:
        if tensor.dtype not in DTYPES:
            raise KarcherError(
                f"{name} of {label} is {tensor.dtype}: a mean needs float16, bfloat16, float32 or "
                "float64; convert it, or copy it from one input instead."
            )
        if tensor.shape != first.shape:
            raise KarcherError(
                f"{name} of {label} has shape {tuple(tensor.shape)}, but {first_label} has "
                f"{tuple(first.shape)}: give tensors of one shape."
            )
        if tensor.device != first.device:
            raise KarcherError(
                f"{name} of {label} is on {tensor.device}, but {first_label} is on "
                f"{first.device}: move them to one device."
            )
