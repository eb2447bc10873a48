"""What a planned merge may not contain."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.documents import SELF
from mergekit_karcher.host.graph import has_metric, is_in_checkpoint, is_outside, loads_of
from mergekit_karcher.host.run import FISHER_NAMES, REGMEAN, MergeRun
from mergekit_karcher.means.inputs import check_weights

_LOG = logging.getLogger(__name__)

# What karcher is called in a config. The second name is one that only we have, so that a config
# with it never falls back to the built-in.
NAMES = ("karcher", "karcher_mean")


def check_merges(merges: Sequence[Any], run: MergeRun) -> None:
    """Check the merge tasks of karcher in a plan.

    Arguments:
        merges: The tasks, as mergekit planned them.
        run: The merge that they are of.

    Raises:
        KarcherError: If weights are wrong, an input lacks a tensor that cannot be done without, or
            parameters differ where granularity model takes the model as one vector.
    """
    for merge in merges:
        name = merge.output_weight.name
        if merge.parameters["origin"] == "base" and merge.base_model not in merge.model_order:
            raise no_base(name)
        check_weights_in(merge, run)
        _check_presence(merge, [*weights_of(merge)])
    if any(merge.parameters["granularity"] == "model" for merge in merges):
        check_uniform([{"weight": _by_name(merge), **merge.parameters} for merge in merges])
        _check_metrics(merges)


def weights_of(merge: Any) -> dict[Any, float]:
    """The weights of a merge task, by model, but for that of a base that takes no part."""
    return {
        model: merge.input_parameters[model]["weight"]
        for model in merge.model_order
        if not is_outside(merge, model)
    }


def check_own_changes(merges: Sequence[Any]) -> None:
    """Check the merge tasks that ask for the metrics of changes from the base.

    Raises:
        KarcherError: If there is no base, if some models of a tensor have other metrics, or if the
            method is another than fisher.
    """
    for merge in merges:
        metrics = {
            str(model): merge.input_parameters[model]["metric"]
            for model in merge.model_order
            if not is_outside(merge, model)
        }
        if SELF not in metrics.values():
            continue
        name = merge.output_weight.name
        if merge.method_name not in FISHER_NAMES:
            raise KarcherError(
                f"metric: self is for merge_method: fisher; {merge.method_name} takes the mean "
                "around the base by origin: base."
            )
        if merge.method_name == REGMEAN:
            raise KarcherError(
                "metric: self is for merge_method: fisher; regmean takes metrics from activations."
            )
        if merge.base_model not in merge.model_order:
            raise no_base(name, "metric: self", "take metrics from data")
        other = next((model for model, metric in metrics.items() if metric != SELF), None)
        if other is not None:
            raise KarcherError(
                f"{name} has metric: self for some models, but {metrics[other] or 'none'} for "
                f"{other}, whose scales have nothing to do with each other: give all models "
                "metric: self, under the parameters of the config."
            )


def check_weights_in(merge: Any, run: MergeRun) -> None:
    """Raise `KarcherError` unless the weights of a merge task can be used."""
    name, weights = merge.output_weight.name, weights_of(merge)
    labels = [run.label(name, str(model)) for model in weights]
    check_weights([*weights.values()], labels, name)


def check_uniform(parameters: Sequence[Mapping[str, Any]]) -> None:
    """Check that all tensors of a merge of granularity model have the same parameters.

    Arguments:
        parameters: For each tensor, those of the method; `weight` maps inputs to numbers.

    Raises:
        KarcherError: If they differ; the message names the parameter.
    """
    for name in parameters[0]:
        values = [
            dict(value) if isinstance(value := of_tensor[name], Mapping) else value
            for of_tensor in parameters
        ]
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


def no_base(
    name: str, setting: str = "origin: base", otherwise: str = "take origin: zero"
) -> KarcherError:
    """What a merge around a base that is not among the inputs of a tensor says."""
    return KarcherError(
        f"{setting} needs the base model's {name}, which is not among the inputs: give a "
        "base_model that has it (under slices, list it among the sources of every slice), or "
        f"{otherwise}."
    )


def warn_of_a_base_that_takes_part(merges: Iterable[Any]) -> None:
    """Say that a base counts as one more model, where no tensor is merged around it."""
    merges = list(merges)
    first = merges[0]
    origins = {merge.parameters["origin"] for merge in merges}
    if first.base_model in first.model_order and origins == {"zero"}:
        _LOG.warning(
            "The base_model takes part in the Karcher mean as one more model, with its weight; "
            "origin: base would take the mean of the differences from it instead."
        )


def check_casts(merge: Any) -> None:
    """Raise if a cast to the dtype of the config made a value of an input infinite.

    For a merge task whose inputs are known to hold one; reads them once more, as their files are.
    """
    for model, load in loads_of(merge):
        if load.dtype is None:
            continue
        tensor = load.model_copy(update={"dtype": None}).execute()
        if tensor is None or not tensor.is_floating_point():
            continue
        cast = load.execute()
        lost = tensor.isfinite() & ~cast.isfinite()
        if lost.any():
            raise KarcherError(
                f"{merge.output_weight.name} of {model} holds {tensor[lost][0].item():.4g}, which "
                f"is too large for dtype: {load.dtype} though not for the {tensor.dtype} of its "
                "file: take dtype: bfloat16 or float32."
            )


def _by_name(merge: Any) -> dict[str, float]:
    return {str(model): weight for model, weight in weights_of(merge).items()}


def _check_presence(merge: Any, models: Sequence[Any]) -> None:
    """Raise if an input lacks a tensor that this merge cannot do without."""
    absent = {model for model, load in loads_of(merge) if not is_in_checkpoint(load)}
    name = merge.output_weight.name
    if merge.parameters["origin"] == "base" and merge.base_model in absent:
        raise no_base(name)
    for model in models if merge.parameters["granularity"] == "model" else ():
        if model in absent and merge.input_parameters[model]["weight"] > 0:
            raise KarcherError(
                f"{name} is not in {model}, and granularity: model needs every tensor of every "
                "model: leave that model out, give it the tensor, or take granularity: tensor, "
                "which merges it from those that have it."
            )


def _check_metrics(merges: Sequence[Any]) -> None:
    """Raise if some tensors of one vector are to have a metric and others not."""
    without = [merge.output_weight.name for merge in merges if not has_metric(merge)]
    if without and len(without) < len(merges):
        raise KarcherError(
            "granularity: model takes the whole model as one vector, but some tensors have a "
            f"metric and {without[0]} has none: give every model a metric for every tensor."
        )
