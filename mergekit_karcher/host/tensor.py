"""One output tensor as our merge methods get it: its inputs, and what the plan knows of them.

Imported once mergekit's own classes are there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup

from mergekit_karcher.host.checks import no_base
from mergekit_karcher.host.documents import SELF
from mergekit_karcher.host.rows import RowLayout
from mergekit_karcher.host.run import MergeRun
from mergekit_karcher.kernels.overlap import input_products
from mergekit_karcher.means.input_gram import InputGram
from mergekit_karcher.means.inputs import Inputs, checked_inputs
from mergekit_karcher.means.products import Products
from mergekit_karcher.report.observation import observed
from mergekit_karcher.sphere.pairwise import geometry_of_gram
from mergekit_karcher.sphere.trig import Floats


class TensorToMerge(NamedTuple):
    """One output tensor, and what is known of it.

    group: its inputs, of one dtype. parameters: those of the method, by name. run: the merge that
    it is part of, which is told of it. metrics: those of the inputs that have one, by model; None
    if the tensor is merged without metrics. rows: where its output units lie. is_layer: whether it
    is multiplied with the inputs of a layer.
    """

    group: TensorGroup
    parameters: Mapping[str, Any]
    run: MergeRun
    metrics: Mapping[Any, torch.Tensor] | None = None
    rows: RowLayout = RowLayout.FIRST
    is_layer: bool = False

    @property
    def name(self) -> str:
        """What the output tensor is called."""
        return self.group.metadata.name or "the tensor"

    @property
    def layout(self) -> RowLayout:
        """How the tensor is turned so that its rows, if they count as vectors, are output units."""
        by_row = self.parameters.get("granularity") == "row"
        return self.rows if by_row else RowLayout.FIRST

    @property
    def is_in_own_changes(self) -> bool:
        """Whether the metrics are to be those of the inputs' changes from the base."""
        return SELF in self.parameters["metric"].values_for(self.group.entries)

    def inputs(self, *, around_base: bool, without_base: bool, by_layer: bool = False) -> Inputs:
        """The inputs that have a weight, checked.

        around_base: and their base apart. by_layer: turned to (out, in), or (expert, out, in).
        """
        group, name = self.group, self.name
        turned = self.rows.layers if by_layer else self.layout.rows_first
        if around_base and group.base is None:
            raise no_base(name)
        entries = group.non_base if without_base else group.entries
        metrics = None
        if self.metrics is not None:
            loaded = [self.metrics.get(entry.id) for entry in entries]
            device = entries[0].tensor.device
            metrics = [None if metric is None else _on(device, metric, turned) for metric in loaded]
        return checked_inputs(
            name,
            [turned(entry.tensor) for entry in entries],
            [self.run.label(name, str(entry.id)) for entry in entries],
            self.parameters["weight"].values_for(entries),
            base=turned(group.base.tensor) if around_base else None,
            metrics=metrics,
        )


def compare(tensor: TensorToMerge, inputs: Inputs, products: Products) -> None:
    """Tell a run how far the inputs of a tensor are apart; for a report, all that there is to it.

    products: those of the inputs, and where the run is watched of a base that is their origin.
    """
    group, run, around_base = tensor.group, tensor.run, inputs.base is not None
    vectors = products.of(slice(len(inputs.tensors)))
    angles = geometry_of_gram(vectors.grams[0], vectors.exponents[0]).angles
    pairs = [float(angle) for angle in angles[np.tril_indices(len(angles), -1)]]
    run.compare(inputs.name, inputs.tensors[0].numel(), pairs, around_base=around_base)
    if run.watched:
        entries = group.non_base if around_base else group.entries
        counted = [entries[place] for place in inputs.places]
        models = [str(entry.id) for entry in counted]
        base = None if group.base is None else str(group.base.id)
        of_inputs = _input_products(tensor, counted)
        run.observe(observed(inputs, products, models, base, of_inputs))


def _input_products(tensor: TensorToMerge, entries: Sequence[TensorEntry]) -> Floats | None:
    """`input_products` of N models' changes of a linear layer, (N, N); NaN for a base among them.

    None where there are no two changes from a base. Of stacked experts, their average.
    """
    base = tensor.group.base
    changed = [place for place, entry in enumerate(entries) if not entry.is_base]
    if base is None or not tensor.is_layer or len(changed) < 2:
        return None
    stacks = [tensor.rows.layers(one.tensor) for one in (base, *(entries[p] for p in changed))]
    if stacks[0].ndim == 2:
        stacks = [stack[None] for stack in stacks]
    seed = zlib.crc32(tensor.name.encode())
    layers = zip(*(stack.unbind() for stack in stacks), strict=True)
    found = np.stack([input_products(ours, origin, seed) for origin, *ours in layers])
    known = np.isfinite(found).sum(0)
    result = np.full((len(entries), len(entries)), np.nan)
    average = np.where(known > 0, np.nansum(found, 0) / np.maximum(known, 1), np.nan)
    result[np.ix_(changed, changed)] = average
    return result


def _on(device: torch.device, metric: Any, turned: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A metric on a device; of input Grams the input axis is always the last."""
    moved = metric.to(device)
    return moved if isinstance(moved, InputGram) else turned(moved)
