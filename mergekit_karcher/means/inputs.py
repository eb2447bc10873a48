"""The inputs of one output tensor, checked once, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.kernels.shared_metric import SharedMetric
from mergekit_karcher.means.metric import DiagonalMetric, checked_metric, shared_metric
from mergekit_karcher.sphere.trig import Floats

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Inputs:
    """The N >= 1 inputs of one output tensor that have a weight; made by `checked_inputs`.

    name: of the output tensor, for messages.
    tensors: of one shape and device, floating, any strides; borrowed.
    labels: the model that each is of, for messages.
    weights: (N,) float64, positive and finite, of any sum.
    places: where each stood among all that were given, those without a weight too.
    base: what the mean is taken around, of the same shape and device; None for zero. Borrowed.
    metrics: each model's metric, None for one that is the same everywhere; None if no model has
        a metric. Borrowed.
    shared_metric: the metric that lengths and angles are those of; None for the plain ones.
    """

    name: str
    tensors: tuple[torch.Tensor, ...]
    labels: tuple[str, ...]
    weights: Floats
    places: tuple[int, ...]
    base: torch.Tensor | None = None
    metrics: tuple[DiagonalMetric | None, ...] | None = None
    shared_metric: SharedMetric | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the dtypes of all tensors promote to; that of the output."""
        dtype = self.tensors[0].dtype
        for tensor in (*self.tensors[1:], *(() if self.base is None else (self.base,))):
            dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    def rows(self, rows: slice) -> Inputs:
        """The same inputs at some indices of their first axis, as views."""
        if rows == slice(None):
            return self
        return replace(
            self,
            tensors=tuple(tensor[rows] for tensor in self.tensors),
            base=None if self.base is None else self.base[rows],
            shared_metric=None if self.shared_metric is None else self.shared_metric.rows(rows),
        )

    def sharing_a_metric(self, floor: float, *, always: bool = False) -> Inputs:
        """The same inputs, with lengths and angles in the metric that their models share.

        Arguments:
            floor: The fraction of each metric's mean that is added to it.
            always: Keep a metric that is the same for every element, too. By itself it changes no
                mean; in a part of larger vectors it weighs that part against the others.
        """
        if self.metrics is None:
            return self
        shared = shared_metric(self.metrics, self.weights.tolist(), floor)
        return replace(self, shared_metric=shared if shared.tensors or always else None)

    @property
    def metrics_are_zero(self) -> bool:
        """Whether there are metrics, and all of them are zero everywhere."""
        return self.metrics is not None and all(m is not None and m.mean == 0 for m in self.metrics)


def checked_inputs(
    name: str,
    tensors: Sequence[torch.Tensor],
    labels: Sequence[str],
    weights: Sequence[float],
    *,
    base: torch.Tensor | None = None,
    metrics: Sequence[torch.Tensor | None] | None = None,
) -> Inputs:
    """The inputs that have a weight, or an error that says which of them cannot be merged.

    Arguments:
        name: The output tensor, for messages.
        tensors: All inputs; those of weight zero may hold anything, of any shape.
        labels: The model of each.
        weights: One for each, finite and >= 0, not all zero.
        base: What the mean is taken around.
        metrics: The metric of each; None for one that is the same everywhere. Costs a pass over
            each of them.

    Returns:
        The inputs. They borrow the tensors.

    Raises:
        KarcherError: If a number of weights or metrics, a weight, dtype, shape or device, or a
            metric is not as it must be.
    """
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
    checked = [
        None if (values := metrics[place]) is None else checked_metric(values, tensor, label, name)
        for place, tensor, label in zip(places, inputs.tensors, inputs.labels, strict=True)
    ]
    return replace(inputs, metrics=tuple(checked))


def check_weights(weights: Sequence[float], labels: Sequence[str], name: str) -> None:
    """Check the weights of the inputs of one output tensor.

    Arguments:
        weights: Must be finite and >= 0, one for each input, not all zero.
        labels, name: The model of each input, and the tensor, for messages.

    Raises:
        KarcherError: If they are not.
    """
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
    tensors, labels, name = list(inputs.tensors), list(inputs.labels), inputs.name
    if inputs.base is not None:
        tensors.append(inputs.base)
        labels.append("the base")
    for tensor, label in zip(tensors, labels, strict=True):
        if tensor.dtype not in _DTYPES:
            raise KarcherError(
                f"{name} of {label} is {tensor.dtype}: a mean needs float16, bfloat16, float32 or "
                "float64; convert it, or copy it from one input instead."
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
