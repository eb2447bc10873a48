"""What can be said of a merge once it is planned, before any weight is read."""

from __future__ import annotations

import difflib
import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.graph import found_by, loads_of
from mergekit_karcher.host.methods import NAMES, check_uniform, no_base
from mergekit_karcher.host.metric_tasks import has_metric, warn_of_mixed_metrics, with_metrics
from mergekit_karcher.host.planned import planned_of
from mergekit_karcher.host.report_task import with_report
from mergekit_karcher.host.run import FISHER, Stage, begin, label
from mergekit_karcher.host.whole_model import with_one_mean
from mergekit_karcher.means.karcher import check_weights
from mergekit_karcher.report.store import make_folder

_LOG = logging.getLogger(__name__)

_REPORT = "MERGEKIT_KARCHER_REPORT"

# The fields of a config below which more parameters may stand.
_NESTED = ("models", "slices", "sources", "modules")


def watch_planner(planner: Any) -> None:
    """Wrap the planning methods of mergekit's `MergePlanner` class, once."""
    if hasattr(planner.plan_to_disk, "__wrapped__"):
        return
    to_disk, in_memory = planner.plan_to_disk, planner.plan_in_memory

    @functools.wraps(to_disk)
    def plan_to_disk(self: Any, out_path: str) -> Any:
        check_parameter_names(self.config, self._method)
        return _looked_at(to_disk(self, out_path), self.config, out_path)

    @functools.wraps(in_memory)
    def plan_in_memory(self: Any) -> Any:
        check_parameter_names(self.config, self._method)
        return _looked_at(in_memory(self), self.config, "in memory")

    planner.plan_to_disk, planner.plan_in_memory = plan_to_disk, plan_in_memory


def watch_flat_planner(module: Any) -> None:
    """Wrap `plan_flat_merge`, the planning function of `mergekit-pytorch`, once."""
    flat = module.plan_flat_merge
    if hasattr(flat, "__wrapped__"):
        return

    @functools.wraps(flat)
    def plan_flat_merge(config: Any, out_path: str, *args: Any, **kwargs: Any) -> Any:
        check_parameter_names(config, module.merge_methods.get(config.merge_method))
        return _looked_at(flat(config, out_path, *args, **kwargs), config, out_path)

    module.plan_flat_merge = plan_flat_merge


def check_parameter_names(config: Any, method: Any) -> None:
    """Raise if a config of our method has a parameter that it does not know, or not there.

    mergekit ignores those, so that a misspelt weight would be a weight of one.
    """
    if config.merge_method not in (*NAMES, FISHER):
        return
    known = [parameter.name for parameter in method.spec.parameters]
    of_a_model = [parameter.name for parameter in method.spec.input_parameters]
    for place, model, name in _parameter_names(config, "the config"):
        if model and name in known and name not in of_a_model:
            raise KarcherError(
                f"{name} stands under {place}, where mergekit does not read it: it belongs to the "
                "whole merge, under the parameters of the config or of a slice."
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known)}."
            raise KarcherError(
                f"Unknown parameter {name} of {place} for {config.merge_method}: {hint}"
            )


def _parameter_names(part: Any, place: str) -> Iterator[tuple[str, bool, str]]:
    """Where a parameter stands, whether that is a model, and its name."""
    for name in getattr(part, "parameters", None) or {}:
        yield place, hasattr(part, "model"), name
    for field in _NESTED:
        children = getattr(part, field, None) or ()
        named = children.items() if isinstance(children, dict) else enumerate(children)
        for key, child in named:
            model = getattr(child, "model", None)
            yield from _parameter_names(child, str(model) if model else f"{field}[{key}]")


def _looked_at(tasks: Any, config: Any, out_path: str) -> Any:
    """The plan, checked, its summary begun, and rebuilt where a mean needs all tensors."""
    title = os.path.basename(os.path.abspath(out_path))
    if config.merge_method not in NAMES and os.environ.get(_REPORT):
        _LOG.warning(
            "%s is set, but only merges by karcher write a report: for %s use mergekit-karcher "
            "report.",
            _REPORT,
            config.merge_method,
        )
    if config.merge_method == FISHER:
        merges = [*_merge_tasks(tasks, (FISHER,))]
        _name_inputs(begin(title, method=FISHER), merges)
        warn_of_mixed_metrics(merges)
        return with_metrics(tasks, merges)
    if config.merge_method not in NAMES:
        return tasks
    folder = _report_folder(title)
    merges, stage = looked_at(tasks, title, watched=folder is not None)
    first = next(iter(merges), None)
    if first is not None and first.base_model in first.model_order:
        _say_what_the_base_does(merges)
    if any(task.parameters["granularity"] == "model" for task in merges):
        tasks = with_one_mean(tasks, merges)
    else:
        tasks = with_metrics(tasks, merges)
    if folder is not None:
        make_folder(folder)
        tasks = with_report(tasks, planned_of(config, merges, config.merge_method), stage, folder)
    return tasks


def looked_at(tasks: Any, title: str, *, watched: bool) -> tuple[list[Any], Stage]:
    """The merge tasks of our method in a plan, checked, and the summary that they begin."""
    stage = begin(title, watched=watched)
    merges = [*_merge_tasks(tasks)]
    _name_inputs(stage, merges)
    warn_of_mixed_metrics(merges)
    for task in merges:
        name = task.output_weight.name
        around_base = task.parameters["origin"] == "base"
        if around_base and task.base_model not in task.model_order:
            raise no_base(name)
        models = [m for m in task.model_order if not (around_base and m == task.base_model)]
        weights = [task.input_parameters[model]["weight"] for model in models]
        check_weights(weights, [label(name, str(model)) for model in models], name)
        _check_presence(task, models)
    if any(task.parameters["granularity"] == "model" for task in merges):
        check_uniform([{"weight": _weights(task), **task.parameters} for task in merges])
        _check_metrics(merges)
    return merges, stage


def _name_inputs(stage: Stage, merges: Sequence[Any]) -> None:
    """Tell the summary what each input of each output tensor is called in its own model."""
    for task in merges:
        name = task.output_weight.name
        inputs = {str(model): name for model in task.model_order}
        inputs |= {str(model): weight.name for model, weight in _weights_read(task)}
        stage.inputs[name] = inputs


def _report_folder(title: str) -> Path | None:
    """Where the environment asks for a report on the merge of that name."""
    asked = os.environ.get(_REPORT)
    if not asked:
        return None
    context = click.get_current_context(silent=True)
    # mergekit-multi merges several times in one command; its name has changed before.
    stages = context is not None and "intermediate_dir" in context.params
    return Path(asked) / title if stages else Path(asked)


def _weights(task: Any) -> dict[str, float]:
    """The weights of a merge task, by model, but for that of a base that takes no part."""
    out = task.base_model if task.parameters["origin"] == "base" else None
    return {
        str(model): task.input_parameters[model]["weight"]
        for model in task.model_order
        if model != out
    }


def _check_presence(task: Any, models: Sequence[Any]) -> None:
    """Raise if an input lacks a tensor that this merge cannot do without."""
    absent = {model for model, load in loads_of(task) if not found_by(load)}
    name = task.output_weight.name
    if task.parameters["origin"] == "base" and task.base_model in absent:
        raise no_base(name)
    for model in models if task.parameters["granularity"] == "model" else ():
        if model in absent and task.input_parameters[model]["weight"] > 0:
            raise KarcherError(
                f"{name} is not in {model}, and granularity: model needs every tensor of every "
                "model: leave that model out, give it the tensor, or take granularity: tensor, "
                "which merges it from those that have it."
            )


def _check_metrics(merges: Sequence[Any]) -> None:
    """Raise if some tensors of one vector are to have a metric and others not."""
    without = [task.output_weight.name for task in merges if not has_metric(task)]
    if without and len(without) < len(merges):
        raise KarcherError(
            "granularity: model takes the whole model as one vector, but some tensors have a "
            f"metric and {without[0]} has none: give every model a metric for every tensor."
        )


def _say_what_the_base_does(merges: Iterable[Any]) -> None:
    origins = {task.parameters["origin"] for task in merges}
    if origins == {"zero"}:
        _LOG.warning(
            "The base_model takes part in the Karcher mean as one more model, with its weight; "
            "origin: base would take the mean of the differences from it instead."
        )


def _weights_read(task: Any) -> Iterable[tuple[Any, Any]]:
    """What a merge task reads, by model; the vocabulary's tasks wrap the one that knows."""
    gather = task.gather_tensors
    while hasattr(gather, "gather_tensors"):
        gather = gather.gather_tensors
    return gather.weight_info.items() if hasattr(gather, "weight_info") else ()


def _merge_tasks(tasks: Iterable[Any], names: Sequence[str] = NAMES) -> Iterator[Any]:
    for task in tasks:
        merge_task = getattr(task, "tensor_task", None)
        if getattr(merge_task, "method_name", None) in names:
            yield merge_task
