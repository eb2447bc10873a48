"""Our merge methods as mergekit sees them: `karcher` and `fisher`.

Imported once mergekit's own classes are there. A planned merge comes in through our tasks, which
call `merge_tensor` with what the plan knows; mergekit's in-memory API comes in through `__call__`,
and has neither metrics nor a summary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.merge_methods.base import (
    BatchOptions,
    MergeMethod,
    MergeMethodSpec,
    TensorEntry,
    TensorGroup,
)
from mergekit.merge_methods.dtype import align_dtype, promoted_dtype

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.checks import check_uniform, no_base
from mergekit_karcher.host.parameters import FISHER_PARAMETERS, KARCHER_PARAMETERS, settings_of
from mergekit_karcher.host.run import FISHER, MergeRun
from mergekit_karcher.means.autograd import merge, merge_whole
from mergekit_karcher.means.finite import check_result
from mergekit_karcher.means.fisher import precision_weighted
from mergekit_karcher.means.inputs import Inputs, checked_inputs
from mergekit_karcher.means.products import Products, needs_exact, products_of
from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.means.solve import combined, solve
from mergekit_karcher.report.observation import observed

# The metrics that a plan has loaded, by model; a model without one has metric: identity.
Metrics = Mapping[Any, torch.Tensor]


class _InMemory(MergeMethod):  # type: ignore[misc]
    """What both methods do with the groups that mergekit hands them without a plan."""

    function: str

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        results = []
        for group, dtype, values in zip(groups, input_dtypes, parameters, strict=True):
            self._refuse_metrics(group, values)
            aligned = align_dtype(group, dtype)
            run = MergeRun("in memory", self.spec.name)
            result = self.merge_tensor(aligned, values, run, saved_as=out_dtype)
            results.append(result if out_dtype is None else result.to(out_dtype))
        return tuple(results)

    def _refuse_metrics(self, group: TensorGroup, parameters: Mapping[str, Any]) -> None:
        metrics = parameters["metric"].values_for(group.entries)
        if any(metrics):
            raise KarcherError(
                f"merge_method: {self.spec.name} reads its metrics in mergekit's commands; in "
                f"Python call mergekit_karcher.{self.function} with tensors and metrics."
            )


class KarcherMerge(_InMemory):
    """The exact weighted Karcher mean; see `mergekit_karcher.karcher_mean`.

    Arguments:
        name: What it is called in a config.
    """

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
        batch_options: BatchOptions | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Merge tensors in memory; with granularity model the groups are the whole model."""
        groups = tuple(groups)
        bound = self._bind_parameters(groups, parameters or {})
        if any(values["granularity"] == "model" for values in bound):
            return self._merge_whole(groups, bound, dtype, out_dtype)
        merged: tuple[torch.Tensor, ...] = super().__call__(
            groups,
            parameters=parameters,
            dtype=dtype,
            out_dtype=out_dtype,
            batch_options=batch_options,
        )
        return merged

    def merge_tensor(
        self,
        group: TensorGroup,
        parameters: Mapping[str, Any],
        run: MergeRun,
        *,
        metrics: Metrics | None = None,
        mean: KarcherMean | None = None,
        saved_as: torch.dtype | None = None,
    ) -> torch.Tensor:
        """One output tensor.

        Arguments:
            group: The inputs, of one dtype.
            parameters: Those of the method, by name.
            run: The merge that it is part of, which is told of it.
            metrics: Those of the inputs, if any is to have one.
            mean: That of the whole model, with granularity model.
            saved_as: The dtype that the result is cast to in the end.

        Returns:
            A new tensor.

        Raises:
            KarcherError: If the inputs cannot be merged.
        """
        inputs = self._inputs(group, parameters, run, metrics)
        if mean is None:
            if parameters["granularity"] == "model":
                raise KarcherError(
                    "granularity: model needs the whole plan of a merge, but this mergekit plans "
                    "merges in a way that mergekit-karcher does not know: upgrade "
                    "mergekit-karcher, or take granularity: tensor."
                )
            result, solution = merge(
                inputs, settings_of(parameters), keep_products=run.watched, saved_as=saved_as
            )
            mean = solution.mean
            self._observe(group, inputs, solution.products, run)
        else:
            result = combined(inputs, mean, saved_as)
        run.record(inputs.name, mean, len(group.entries))
        return result

    def measure(
        self,
        group: TensorGroup,
        parameters: Mapping[str, Any],
        run: MergeRun,
        metrics: Metrics | None,
    ) -> None:
        """The mean of one tensor, told to the run like that of a merge, without an output."""
        inputs = self._inputs(group, parameters, run, metrics)
        solution = solve(inputs, settings_of(parameters), keep_products=run.watched)
        self._observe(group, inputs, solution.products, run)
        run.record(inputs.name, solution.mean, len(group.entries))

    def products(
        self,
        group: TensorGroup,
        parameters: Mapping[str, Any],
        run: MergeRun,
        metrics: Metrics | None,
    ) -> Products:
        """One tensor's part of the inner products of whole models that have a weight."""
        inputs = self._inputs(group, parameters, run, metrics)
        exact = needs_exact(inputs.tensors)
        products = products_of(inputs, with_base=run.watched, exact=exact)
        self._observe(group, inputs, (products,) if run.watched else (), run)
        return products.of(slice(len(inputs.tensors)))

    def _inputs(
        self,
        group: TensorGroup,
        parameters: Mapping[str, Any],
        run: MergeRun,
        metrics: Metrics | None,
    ) -> Inputs:
        name = group.metadata.name or "the tensor"
        around_base = parameters["origin"] == "base"
        if around_base and group.base is None:
            raise no_base(name)
        base = group.base.tensor if around_base else None
        inputs = _checked(group, parameters, run, metrics, around_base, base)
        if base is not None:
            run.warn_of_16_bits(name, {str(tensor.dtype) for tensor in (*inputs.tensors, base)})
        whole = parameters["granularity"] == "model"
        if inputs.metrics_are_zero and not whole:
            run.note_zero_metrics(name)
        return inputs.sharing_a_metric(parameters["floor"], always=whole)

    def _observe(
        self, group: TensorGroup, inputs: Inputs, products: Sequence[Products], run: MergeRun
    ) -> None:
        """Tell a run that is to be reported on what the inputs look like to each other."""
        entries = group.entries if inputs.base is None else group.non_base
        models = [str(entries[place].id) for place in inputs.places]
        base = None if group.base is None else str(group.base.id)
        for of_tensor in products:
            run.observe(observed(inputs, of_tensor, models, base))

    def _merge_whole(
        self,
        groups: Sequence[TensorGroup],
        parameters: Sequence[Mapping[str, Any]],
        dtype: torch.dtype | None,
        out_dtype: torch.dtype | None,
    ) -> tuple[torch.Tensor, ...]:
        check_uniform(parameters)
        run = MergeRun("in memory", self.spec.name)
        parts = []
        for group, values in zip(groups, parameters, strict=True):
            self._refuse_metrics(group, values)
            aligned = align_dtype(group, dtype or promoted_dtype(group))
            parts.append(self._inputs(aligned, values, run, None))
        counted = _counted_once(groups, parts)
        merged, _ = merge_whole(parts, settings_of(parameters[0]), counted)
        if out_dtype is None:
            return tuple(merged)
        for tensor, inputs in zip(merged, parts, strict=True):
            check_result(tensor, inputs, out_dtype)
        return tuple(tensor.to(out_dtype) for tensor in merged)


class FisherMerge(_InMemory):
    """The precision-weighted mean; see `mergekit_karcher.fisher_mean`.

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
        self,
        group: TensorGroup,
        parameters: Mapping[str, Any],
        run: MergeRun,
        *,
        metrics: Metrics | None = None,
        saved_as: torch.dtype | None = None,
    ) -> torch.Tensor:
        """One output tensor; arguments, result and errors are those of `KarcherMerge`."""
        inputs = _checked(group, parameters, run, metrics, parameters["origin"] == "base", None)
        if inputs.metrics_are_zero:
            run.note_zero_metrics(inputs.name)
        result = precision_weighted(inputs, parameters["floor"], saved_as)
        run.record(inputs.name, None, len(group.entries))
        return result


def make_method(name: str) -> Any:
    """The merge method of that name, one of `NAMES` or `FISHER`."""
    return FisherMerge() if name == FISHER else KarcherMerge(name)


def _checked(
    group: TensorGroup,
    parameters: Mapping[str, Any],
    run: MergeRun,
    metrics: Metrics | None,
    without_base: bool,
    base: torch.Tensor | None,
) -> Inputs:
    name = group.metadata.name or "the tensor"
    entries: Sequence[TensorEntry] = group.non_base if without_base else group.entries
    on_device = None
    if metrics is not None:
        on_device = [
            None if entry.id not in metrics else metrics[entry.id].to(entry.tensor.device)
            for entry in entries
        ]
    return checked_inputs(
        name,
        [entry.tensor for entry in entries],
        [run.label(name, str(entry.id)) for entry in entries],
        parameters["weight"].values_for(entries),
        base=base,
        metrics=on_device,
    )


def _counted_once(groups: Sequence[TensorGroup], parts: Sequence[Inputs]) -> list[bool]:
    """Whether each part counts: of tied weights, one memory in every input, the first does.

    Arguments:
        groups: As they were handed in: a cast would give tied tensors a memory of their own.
        parts: The inputs of each.
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
