"""Our merge methods as mergekit sees them: `karcher` and `fisher`.

Imported once mergekit's own classes are there. A planned merge comes in through our tasks, which
call `merge_tensor` with what the plan knows; mergekit's in-memory API comes in through `__call__`,
and has neither metrics nor a summary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from mergekit.merge_methods.base import MergeMethod, MergeMethodSpec, TensorGroup
from mergekit.merge_methods.dtype import align_dtype, promoted_dtype

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.checks import check_uniform
from mergekit_karcher.host.parameters import FISHER_PARAMETERS, KARCHER_PARAMETERS, settings_of
from mergekit_karcher.host.run import FISHER, FISHER_NAMES, REGMEAN, MergeRun
from mergekit_karcher.host.tensor import TensorToMerge, compare
from mergekit_karcher.means.autograd import merge, merge_whole
from mergekit_karcher.means.finite import check_result
from mergekit_karcher.means.fisher import precision_weighted, shares_of
from mergekit_karcher.means.input_gram import InputGram
from mergekit_karcher.means.inputs import Inputs
from mergekit_karcher.means.matrix_mean import matrix_mean
from mergekit_karcher.means.precision import starting_precision
from mergekit_karcher.means.products import Products, products_of
from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.means.solve import Solution, combined, solve
from mergekit_karcher.sphere.pairwise import geometry_of_gram


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
            # A report tells of coefficients, and of angles however small.
            settings = replace(settings_of(tensor.parameters), for_output=not run.watched)
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
        precision = starting_precision(inputs)
        products = products_of(inputs, with_base=watched, precision=precision)
        compare(tensor, inputs, products)
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
        compare(tensor, inputs, solution.products[0])
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


_FISHER_PAPERS = {
    FISHER: ("Fisher-weighted mean", "2111.09832"),
    REGMEAN: ("RegMean", "2212.09849"),
}


class FisherMerge(_InMemory):
    """The mean of models in their own metrics, by the name that a config has for it.

    The mean of the differences from a base, added to the base, is the mean of the others: so with
    origin: base the base takes no part. In memory, without metrics, all elements count alike.
    """

    function = "fisher_mean"

    def __init__(self, name: str) -> None:
        title, paper = _FISHER_PAPERS[name]
        self.spec = MergeMethodSpec(
            name=name,
            pretty_name=f"{title} (mergekit-karcher {__version__})",
            reference_url=f"https://arxiv.org/abs/{paper}",
            parameters=FISHER_PARAMETERS,
        )

    def merge_tensor(
        self, tensor: TensorToMerge, *, saved_as: torch.dtype | None = None
    ) -> torch.Tensor:
        """One output tensor, told to its run; as by `KarcherMerge.merge_tensor`."""
        inputs = self._inputs(tensor)
        if inputs.base is not None:
            _note_changes(tensor, inputs)
        if inputs.base is None and inputs.grams is None:
            result = precision_weighted(inputs, tensor.parameters["floor"], saved_as)
        else:
            mean = matrix_mean(inputs, tensor.parameters["ridge"], saved_as)
            shape = tensor.group.tensors[0].shape
            result = tensor.rows.from_layers(mean.tensor, shape)
            if mean.unsolved:
                tensor.run.note("could not be solved, the linear mean instead", inputs.name)
            if mean.low_rank:
                tensor.run.note("changes of low rank, such as a LoRA's", inputs.name)
        tensor.run.record(inputs.name, None, len(tensor.group.entries))
        return result

    def measure(self, tensor: TensorToMerge) -> None:
        """How much each input of one tensor counts, told to its run, and how far they are apart."""
        inputs = self._inputs(tensor)
        around_base = tensor.parameters["origin"] == "base" and tensor.group.base is not None
        if around_base and inputs.base is None and not any(inputs.metrics or ()):
            inputs = tensor.inputs(around_base=True, without_base=True)
        shares = shares_of(inputs, tensor.parameters["floor"])
        compare(tensor, inputs, products_of(inputs, with_base=True))
        tensor.run.weigh(inputs.name, shares)

    def _inputs(self, tensor: TensorToMerge) -> Inputs:
        is_layer = tensor.is_in_own_changes and tensor.is_layer
        around_base = is_layer and self._has_base(tensor)
        grams = any(isinstance(metric, InputGram) for metric in (tensor.metrics or {}).values())
        inputs = tensor.inputs(
            around_base=around_base,
            without_base=tensor.parameters["origin"] == "base",
            by_layer=around_base or grams,
        )
        if inputs.metrics_are_zero:
            tensor.run.note_zero_metrics(inputs.name)
        return inputs

    def _has_base(self, tensor: TensorToMerge) -> bool:
        if tensor.group.base is None:
            tensor.run.note("not in the base, merged by the linear mean", tensor.name)
        return tensor.group.base is not None


def _note_changes(tensor: TensorToMerge, inputs: Inputs) -> None:
    """Tell a run how long the changes of a layer are, and how far apart."""
    products = products_of(inputs, with_base=True)
    compare(tensor, inputs, products)
    norms = geometry_of_gram(products.grams[0], products.exponents[0]).norms
    models = [str(tensor.group.non_base[place].id) for place in inputs.places]
    tensor.run.note_own_changes(models, norms[:-1], float(norms[-1]))


def make_method(name: str) -> Any:
    """The merge method that a config calls by that name."""
    return FisherMerge(name) if name in FISHER_NAMES else KarcherMerge(name)


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
