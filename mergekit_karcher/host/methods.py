"""The merge method that mergekit sees: parameters, contract, and what goes into the summary."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.parameters import (
    floor_parameter,
    metric_parameter,
    origin_parameter,
    parameter,
    weight_parameter,
)
from mergekit_karcher.host.run import (
    is_watched,
    label,
    note_zero_metrics,
    observe,
    record,
    warn_of_16_bits,
)
from mergekit_karcher.means.karcher import (
    MAX_ITER,
    TOL,
    Group,
    Products,
    Settings,
    Watch,
    check_stopping,
    check_weights,
    chosen_of,
    combined,
    in_metric,
    mean_of_products,
    measure,
    merge,
    needs_exact,
    positive,
    products_of,
    taking,
    total,
)
from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.report.observation import observed
from mergekit_karcher.sphere.solver import Magnitude, Status

_LOG = logging.getLogger(__name__)

# The second is a name that only we have: a config that uses it never falls back to the built-in.
NAMES = ("karcher", "karcher_mean")

# The one that mergekit gives for its own.
REFERENCE_URL = "https://arxiv.org/abs/2603.04972"


def settings_of(parameters: Mapping[str, Any]) -> Settings:
    """Those of our shared parameters that say how to merge, as `merge` takes them."""
    return Settings(
        parameters["granularity"],
        Magnitude(parameters["magnitude"]),
        parameters["max_iter"],
        parameters["tol"],
    )


def no_base(name: str) -> KarcherError:
    """What a merge around a base that is not there says."""
    return KarcherError(
        f"origin: base needs the base model's {name}, which is not among the inputs: give a "
        "base_model that has it (under slices, list it among the sources of every slice), or take "
        "origin: zero."
    )


def build_method(name: str) -> Any:
    """A `KarcherMerge` that mergekit knows by that name.

    mergekit's classes are looked up here, and not at the top of this module, because mergekit may
    be in the middle of its own import.
    """
    import torch
    from mergekit.merge_methods.base import (
        GroupMergeMethod,
        MergeMethodSpec,
        TensorGroup,
    )
    from mergekit.merge_methods.dtype import align_dtype

    class KarcherMerge(GroupMergeMethod):  # type: ignore[misc]
        """The exact weighted Karcher mean; see `mergekit_karcher.karcher_mean`."""

        spec = MergeMethodSpec(
            name=name,
            pretty_name=f"Karcher Mean (mergekit-karcher {__version__})",
            reference_url=REFERENCE_URL,
            parameters=(
                weight_parameter(),
                metric_parameter(),
                parameter(
                    "granularity",
                    Literal["tensor", "row", "model"],
                    "tensor, row or model",
                    "tensor",
                ),
                origin_parameter(),
                parameter(
                    "magnitude",
                    Literal["arithmetic", "linear", "geometric"],
                    "arithmetic, linear or geometric",
                    "arithmetic",
                ),
                floor_parameter(),
                parameter(
                    "max_iter",
                    int,
                    "a whole number of 1 or more",
                    MAX_ITER,
                    check=lambda value: check_stopping(value, TOL),
                ),
                parameter(
                    "tol",
                    float,
                    "a positive number of radians",
                    TOL,
                    check=lambda value: check_stopping(MAX_ITER, value),
                ),
            ),
        )

        def merge_group(
            self,
            group: TensorGroup,
            /,
            *,
            mean: KarcherMean | None = None,
            **parameters: Any,
        ) -> torch.Tensor:
            """One output tensor, with the mean that the whole model has if there is one.

            metrics: those of the inputs that the plan had loaded, by model.
            """
            own, weights = self._inputs(group, parameters)
            if mean is None:
                own = self._in_metric(group, own, parameters)
                watch = self._watch(group, own, weights)
                (merged,), mean = merge([own], weights, settings_of(parameters), watch)
                record(own, chosen_of(mean, positive(weights)))
            else:
                merged = combined(taking(own, positive(weights)), mean.coefficients)
                record(own, mean)
            return merged

        def measure(self, group: TensorGroup, /, **parameters: Any) -> None:
            """The mean of one tensor, recorded like that of a merge, without an output."""
            own, weights = self._inputs(group, parameters)
            own = self._in_metric(group, own, parameters)
            watch = self._watch(group, own, weights)
            mean = measure(own, weights, settings_of(parameters), watch)
            record(own, chosen_of(mean, positive(weights)))

        def products(self, group: TensorGroup, /, **parameters: Any) -> Products:
            """One tensor's part of the whole model's Gram matrix, of inputs that have a weight."""
            own, weights = self._inputs(group, parameters)
            own = self._in_metric(group, own, parameters)
            watch = self._watch(group, own, weights)
            own = taking(own, positive(weights))
            exact = needs_exact(own.tensors)
            products = products_of(own, with_base=watch is not None, exact=exact)
            if watch is not None:
                watch(own, products)
            return products.first(len(own.tensors))

        def mean(
            self, parts: Sequence[Products], weights: Sequence[float], **parameters: Any
        ) -> KarcherMean:
            """The whole model's mean, from its parts; weights are those that are not zero."""
            mean = mean_of_products(total(parts), weights, settings_of(parameters))
            if mean.status is Status.ZERO:
                _LOG.warning("The whole model: %s.", mean.status.value)
            return mean

        def _inputs(
            self, group: TensorGroup, parameters: Mapping[str, Any]
        ) -> tuple[Group, list[float]]:
            tensor_name = group.metadata.name or "the tensor"
            around_base = parameters["origin"] == "base"
            if around_base and group.base is None:
                raise no_base(tensor_name)
            entries = self._entries(group, around_base)
            tensors = [entry.tensor for entry in entries]
            labels = [label(tensor_name, str(entry.id)) for entry in entries]
            weights = parameters["weight"].values_for(entries)
            check_weights(weights, labels, tensor_name)
            base = group.base.tensor if around_base else None
            if base is not None:
                warn_of_16_bits(tensor_name, {str(t.dtype) for t in (*tensors, base)})
            return Group(tensor_name, tensors, labels, base), weights

        def _in_metric(
            self, group: TensorGroup, own: Group, parameters: Mapping[str, Any]
        ) -> Group:
            entries = self._entries(group, own.base is not None)
            if not any(parameters["metric"].values_for(entries)):
                return own
            metrics = parameters.get("metrics")
            if metrics is None:
                raise KarcherError(
                    f"merge_method: {name} reads its metrics in mergekit's commands; in Python "
                    "call mergekit_karcher.karcher_mean with tensors and metrics."
                )
            found = [metrics.get(entry.id) for entry in entries]
            device = own.tensors[0].device
            whole = parameters["granularity"] == "model"
            own, seen = in_metric(
                own,
                [None if metric is None else metric.to(device) for metric in found],
                parameters["weight"].values_for(entries),
                parameters["floor"],
                whole=whole,
            )
            if not seen and not whole:
                note_zero_metrics(own.name)
            return own

        def _entries(self, group: TensorGroup, around_base: bool) -> Any:
            return group.non_base if around_base else group.entries

        def _watch(self, group: TensorGroup, own: Group, weights: Sequence[float]) -> Watch | None:
            """What tells the report on the merge under way, if there is to be one."""
            if not is_watched(own.name):
                return None
            entries = self._entries(group, own.base is not None)
            chosen = positive(weights)
            names = [str(entries[index].id) for index in chosen]
            base = str(group.base.id) if group.base is not None else None

            def watch(taking_part: Group, products: Products) -> None:
                own_weights = [weights[index] for index in chosen]
                observe(observed(taking_part, products, names, own_weights, base))

            return watch

        def _execute(
            self,
            groups: Sequence[TensorGroup],
            parameters: list[dict[str, Any]],
            options: Any,
            *,
            input_dtypes: Sequence[torch.dtype | None],
            out_dtype: torch.dtype | None = None,
        ) -> tuple[torch.Tensor, ...]:
            """As always; but without a mean from a plan, the groups here are the whole model."""
            settings = [own["granularity"] for own in parameters]
            if "model" not in settings or "mean" in parameters[0]:
                results: tuple[torch.Tensor, ...] = super()._execute(
                    groups, parameters, options, input_dtypes=input_dtypes, out_dtype=out_dtype
                )
                return results
            check_uniform(parameters)
            owns = [
                self._inputs(align_dtype(group, dtype), own)
                for group, dtype, own in zip(groups, input_dtypes, parameters, strict=True)
            ]
            weights = owns[0][1]
            for group, (own, _), given in zip(groups, owns, parameters, strict=True):
                self._in_metric(group, own, given)  # refuses
            merged, mean = merge([own for own, _ in owns], weights, settings_of(parameters[0]))
            for own, _ in owns:
                record(own, mean)
            return tuple(merged if out_dtype is None else [t.to(dtype=out_dtype) for t in merged])

    return KarcherMerge()


def check_uniform(parameters: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless all tensors of a merge of granularity model have the same parameters.

    parameters: for each tensor, those of the method; `weight` is a mapping from inputs to numbers.
    """
    for name in parameters[0]:
        values = [dict(v) if isinstance(v := own[name], Mapping) else v for own in parameters]
        other = next((value for value in values if value != values[0]), None)
        if other is not None:
            if isinstance(other, dict):
                shown = "different weights of a model, or different models, for different tensors"
            else:
                shown = f"both {name}: {values[0]} and {name}: {other}"
            raise KarcherError(
                f"granularity: model takes the whole model as one vector, but there are {shown}: "
                f"give one {name} for the whole merge, or take granularity: tensor."
            )
