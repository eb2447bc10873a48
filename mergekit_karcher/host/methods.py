"""Our merge methods as mergekit sees them: `karcher` and `fisher`.

Imported once mergekit's own classes are there. A planned merge comes in through our tasks, which
call `merge_tensor` with what the plan knows; mergekit's in-memory API comes in through `__call__`,
and has neither metrics nor a summary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mergekit.merge_methods.base import MergeMethod, MergeMethodSpec, TensorGroup
from mergekit.merge_methods.dtype import align_dtype, promoted_dtype

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.checks import check_uniform, no_base
from mergekit_karcher.host.parameters import FISHER_PARAMETERS, KARCHER_PARAMETERS, settings_of
from mergekit_karcher.host.rows import RowLayout
from mergekit_karcher.host.run import FISHER, MergeRun
from mergekit_karcher.means.autograd import merge, merge_whole
from mergekit_karcher.means.finite import check_result
from mergekit_karcher.means.fisher import precision_weighted, shares_of
from mergekit_karcher.means.inputs import Inputs, checked_inputs
from mergekit_karcher.means.products import Products, needs_exact, products_of
from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.means.solve import Solution, combined, solve
from mergekit_karcher.report.observation import observed
from mergekit_karcher.sphere.pairwise import geometry_of_gram


class TensorToMerge(NamedTuple):
    """One output tensor, and what is known of it.

    group: its inputs, of one dtype. parameters: those of the method, by name. run: the merge that
    it is part of, which is told of it. metrics: those of the inputs that have one, by model; None
    if the tensor is merged without metrics. rows: where its output units lie.
    """

    group: TensorGroup
    parameters: Mapping[str, Any]
    run: MergeRun
    metrics: Mapping[Any, torch.Tensor] | None = None
    rows: RowLayout = RowLayout.FIRST

    @property
    def name(self) -> str:
        """What the output tensor is called."""
        return self.group.metadata.name or "the tensor"

    @property
    def layout(self) -> RowLayout:
        """How the tensor is turned so that its rows, if they count as vectors, are output units."""
        by_row = self.parameters.get("granularity") == "row"
        return self.rows if by_row else RowLayout.FIRST

    def inputs(self, *, around_base: bool, without_base: bool) -> Inputs:
        """The inputs that have a weight, checked; around_base: and their base apart."""
        group, name, turned = self.group, self.name, self.layout.rows_first
        if around_base and group.base is None:
            raise no_base(name)
        entries = group.non_base if without_base else group.entries
        metrics = None
        if self.metrics is not None:
            loaded = [self.metrics.get(entry.id) for entry in entries]
            device = entries[0].tensor.device
            metrics = [None if m is None else turned(m.to(device)) for m in loaded]
        return checked_inputs(
            name,
            [turned(entry.tensor) for entry in entries],
            [self.run.label(name, str(entry.id)) for entry in entries],
            self.parameters["weight"].values_for(entries),
            base=turned(group.base.tensor) if around_base else None,
            metrics=metrics,
        )


class _InMemory(MergeMethod):  # type: ignore[misc]
    """What both methods do with the groups that mergekit hands them without a plan."""

    function: str

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: Sequence[Mapping[str, Any]],
        options: Any,
        *,
        input_dtypes: Sequence[torch.dtype],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        results = []
        for group, values, dtype in zip(groups, parameters, input_dtypes, strict=True):
            tensor = self._tensor(group, values, dtype)
            result = self.merge_tensor(tensor, saved_as=out_dtype)
            results.append(result if out_dtype is None else result.to(out_dtype))
        return tuple(results)

    def _tensor(
        self, group: TensorGroup, parameters: Mapping[str, Any], dtype: torch.dtype
    ) -> TensorToMerge:
        if any(parameters["metric"].values_for(group.entries)):
            raise KarcherError(
                f"merge_method: {self.spec.name} reads its metrics in mergekit's commands; in "
                f"Python call mergekit_karcher.{self.function} with tensors and metrics."
            )
        run = MergeRun("in memory", self.spec.name)
        return TensorToMerge(align_dtype(group, dtype), parameters, run)


class KarcherMerge(_InMemory):
    """The exact weighted Karcher mean, by the name that a config has for it."""

    function = "karcher_mean"

    def __init__(self, name: str) -> None:
        self.spec = MergeMethodSpec(
            name=name,
            pretty_name=f"Karcher Mean (mergekit-karcher {__version__})",
            # The one that mergekit gives for its own.
            reference_url="https://arxiv.org/abs/2603.04972",
            parameters=KARCHER_PARAMETERS,
        )

    def __call__(
        self,
        groups: Sequence[TensorGroup],
        /,
        *,
        parameters: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        out_dtype: torch.dtype | None = None,
        batch_options: Any = None,
    ) -> tuple[torch.Tensor, ...]:
        """Merge tensors in memory; with granularity model the groups are the whole model."""
        groups = tuple(groups)
        bound = self._bind_parameters(groups, parameters or {})
        if any(values["granularity"] == "model" for values in bound):
            return self._merge_whole(groups, bound, dtype, out_dtype)
        merged: tuple[torch.Tensor, ...] = super().__call__(
            groups, parameters=parameters, dtype=dtype, out_dtype=out_dtype
        )
        return merged

    def merge_tensor(
        self,
        tensor: TensorToMerge,
        *,
        mean: KarcherMean | None = None,
        saved_as: torch.dtype | None = None,
    ) -> torch.Tensor:
        """One output tensor, told to its run.

        Arguments:
            tensor: What is to be merged.
            mean: That of the whole model, with granularity model.
            saved_as: The dtype that the result is cast to in the end.

        Returns:
            A new tensor.

        Raises:
            KarcherError: If the inputs cannot be merged.
        """
        inputs, run = self._inputs(tensor), tensor.run
        if mean is None:
            if tensor.parameters["granularity"] == "model":
                raise KarcherError(
                    "granularity: model needs the whole plan of a merge, but this mergekit plans "
                    "merges in a way that mergekit-karcher does not know: upgrade "
                    "mergekit-karcher, or take granularity: tensor."
                )
            settings = settings_of(tensor.parameters)
            result, solution = merge(inputs, settings, with_base=run.watched, saved_as=saved_as)
            self._observe(tensor, inputs, solution)
        else:
            result = combined(inputs, mean, saved_as)
            run.record(inputs.name, mean, len(tensor.group.entries))
        return tensor.layout.restored(result, tensor.group.tensors[0].shape)

    def measure(self, tensor: TensorToMerge) -> None:
        """The mean of one tensor, told to its run like that of a merge, without an output."""
        inputs = self._inputs(tensor)
        settings = settings_of(tensor.parameters)
        self._observe(tensor, inputs, solve(inputs, settings, with_base=tensor.run.watched))

    def products(self, tensor: TensorToMerge) -> Products:
        """One tensor's part of the inner products of the models that have a weight."""
        inputs, watched = self._inputs(tensor), tensor.run.watched
        products = products_of(inputs, with_base=watched, exact=needs_exact(inputs.tensors))
        _compare(tensor, inputs, products)
        return products.of(slice(len(inputs.tensors)))

    def _inputs(self, tensor: TensorToMerge) -> Inputs:
        around_base = tensor.parameters["origin"] == "base"
        whole = tensor.parameters["granularity"] == "model"
        inputs = tensor.inputs(around_base=around_base, without_base=around_base)
        if inputs.base is not None:
            dtypes = {str(one.dtype) for one in (*inputs.tensors, inputs.base)}
            tensor.run.warn_of_16_bits(inputs.name, dtypes)
        if inputs.metrics_are_zero and not whole:
            tensor.run.note_zero_metrics(inputs.name)
        return inputs.sharing_a_metric(tensor.parameters["floor"], always=whole)

    def _observe(self, tensor: TensorToMerge, inputs: Inputs, solution: Solution) -> None:
        """Tell a run how a tensor of its own mean came out."""
        _compare(tensor, inputs, solution.products[0])
        present = len(tensor.group.entries)
        tensor.run.record(inputs.name, solution.mean, present, solution.blocks)

    def _merge_whole(
        self,
        groups: Sequence[TensorGroup],
        parameters: Sequence[Mapping[str, Any]],
        dtype: torch.dtype | None,
        out_dtype: torch.dtype | None,
    ) -> tuple[torch.Tensor, ...]:
        check_uniform(parameters)
        parts = [
            self._inputs(self._tensor(group, values, dtype or promoted_dtype(group)))
            for group, values in zip(groups, parameters, strict=True)
        ]
        counted = _counted_once(groups, parts)
        merged, _ = merge_whole(parts, settings_of(parameters[0]), counted)
        if out_dtype is None:
            return tuple(merged)
        for result, inputs in zip(merged, parts, strict=True):
            check_result(result, inputs, out_dtype)
        return tuple(result.to(out_dtype) for result in merged)


class FisherMerge(_InMemory):
    """The precision-weighted mean.

    The mean of the differences from a base, added to the base, is the mean of the others: so with
    origin: base the base takes no part. In memory, without metrics, all elements count alike.
    """

    function = "fisher_mean"

    def __init__(self) -> None:
        self.spec = MergeMethodSpec(
            name=FISHER,
            pretty_name=f"Fisher-weighted mean (mergekit-karcher {__version__})",
            reference_url="https://arxiv.org/abs/2111.09832",
            parameters=FISHER_PARAMETERS,
        )

    def merge_tensor(
        self, tensor: TensorToMerge, *, saved_as: torch.dtype | None = None
    ) -> torch.Tensor:
        """One output tensor, told to its run; as by `KarcherMerge.merge_tensor`."""
        inputs = self._inputs(tensor)
        result = precision_weighted(inputs, tensor.parameters["floor"], saved_as)
        tensor.run.record(inputs.name, None, len(tensor.group.entries))
        return result

    def measure(self, tensor: TensorToMerge) -> None:
        """How much each input of one tensor counts, told to its run, and how far they are apart."""
        inputs = self._inputs(tensor)
        shares = shares_of(inputs, tensor.parameters["floor"])
        _compare(tensor, inputs, products_of(inputs))
        tensor.run.weigh(inputs.name, shares)

    def _inputs(self, tensor: TensorToMerge) -> Inputs:
        without_base = tensor.parameters["origin"] == "base"
        inputs = tensor.inputs(around_base=False, without_base=without_base)
        if inputs.metrics_are_zero:
            tensor.run.note_zero_metrics(inputs.name)
        return inputs


def _compare(tensor: TensorToMerge, inputs: Inputs, products: Products) -> None:
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
        models = [str(entries[place].id) for place in inputs.places]
        base = None if group.base is None else str(group.base.id)
        run.observe(observed(inputs, products, models, base))


def make_method(name: str) -> Any:
    """The merge method that a config calls by that name."""
    return FisherMerge() if name == FISHER else KarcherMerge(name)


def _counted_once(groups: Sequence[TensorGroup], parts: Sequence[Inputs]) -> list[bool]:
    """Whether each part counts: of tied weights, one memory in every input, the first does.

    groups: as they were handed in, since a cast would give tied tensors a memory of their own.
    """
    seen = set()
    counted = []
    for group, part in zip(groups, parts, strict=True):
        entries = group.entries if part.base is None else group.non_base
        tensors = [entries[place].tensor for place in part.places]
        memory = tuple((t.data_ptr(), t.shape, t.stride()) for t in tensors)
        counted.append(memory not in seen or tensors[0].numel() == 0)
        seen.add(memory)
    return counted
