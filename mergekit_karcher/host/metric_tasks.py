"""Metrics in mergekit's graph: one more load beside that of each input."""

# mergekit's tasks are pydantic models, which read annotations: they must be real ones here.
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.host.fisher_method import IDENTITY, METRICS, NAME
from mergekit_karcher.host.graph import (
    found_by,
    is_buffer,
    loads_of,
    model_type_of,
    names_of,
    with_merges_replaced,
)

# For each model that has a metric of a tensor, its name and the task that loads it.
Loads = tuple[tuple[str, Any], ...]

_LOG = logging.getLogger(__name__)

_loaders: dict[str, Any] = {}


@cache
def _task_types() -> SimpleNamespace:
    """Our kinds of task, made when mergekit is whole."""
    from mergekit.architecture.conversion import convert_checkpoint_tensors
    from mergekit.common import ImmutableMap
    from mergekit.graph import Task

    class LoadMetric(Task[Any]):  # type: ignore[misc]
        """One tensor of a metric, by the name that the model's own checkpoint has for it.

        model_type: of a model whose checkpoints have that tensor in parts, under other names.
        """

        metric: str
        tensor: str
        model_type: str | None
        label: str | None

        def arguments(self) -> dict[str, Any]:
            return {}

        def priority(self) -> int:
            return -1000

        def group_label(self) -> str | None:
            return self.label

        def execute(self, **_: Any) -> Any:
            loader = _loaders[self.metric]
            if self.model_type is None:
                return loader.get_tensor(self.tensor)
            sources = {name: partial(loader.get_tensor, name) for name in loader.index.tensor_paths}
            made = convert_checkpoint_tensors(self.model_type, sources, self.tensor)
            if made is None:
                raise KarcherError(
                    f"{self.tensor} cannot be put together from the metric {self.metric}: make it "
                    "anew from its model."
                )
            return made

    class MergeWithMetrics(Task[Any]):  # type: ignore[misc]
        """One output tensor of a merge task, with the metrics of its inputs."""

        merge_task: Task
        loads: Loads

        def arguments(self) -> dict[str, Any]:
            return {"tensors": self.merge_task.gather_tensors, **asked_of(self.loads)}

        def group_label(self) -> Any:
            return self.merge_task.group_label()

        def uses_accelerator(self) -> bool:
            return True

        def execute(self, tensors: dict[Any, Any], **loaded: Any) -> Any:
            metrics = metrics_of(self.merge_task, loaded)
            known = {**dict(self.merge_task.parameters.items()), METRICS: metrics}
            changed = {"parameters": ImmutableMap(data=known)}
            return self.merge_task.model_copy(update=changed).execute(tensors=tensors)

    return SimpleNamespace(LoadMetric=LoadMetric, MergeWithMetrics=MergeWithMetrics)


def with_metrics(tasks: Sequence[Any], merges: Sequence[Any]) -> list[Any]:
    """A plan whose merge tasks load the metrics that they are to have; they are opened here."""
    types = _task_types()
    return with_merges_replaced(
        tasks,
        {
            id(merge): types.MergeWithMetrics(merge_task=merge, loads=metric_loads(merge))
            for merge in merges
            if has_metric(merge)
        },
    )


def warn_of_mixed_metrics(merges: Sequence[Any]) -> None:
    """Say what the metrics of a plan tell of themselves, where that cannot be what was meant."""
    used = {(str(model), metric) for merge in merges for model, _, metric in _asked(merge)}
    made: dict[str, str] = {}
    models = {os.path.realpath(model): model for model, _ in used}
    for model, metric in sorted(used):
        about = _about(metric)
        if about is None:
            continue
        made[model] = ", ".join(str(about[key]) for key in ("kind", "length") if key in about)
        origin = models.get(os.path.realpath(about.get("model", "")))
        if origin is not None and origin != model:
            _LOG.warning("The metric %s of %s was made of %s.", metric, model, origin)
    if len(set(made.values())) > 1:
        _LOG.warning(
            "The metrics of this merge were made in different ways (%s): their scales differ, and "
            "act like weights.",
            "; ".join(f"{model}: {how}" for model, how in made.items()),
        )


def _about(metric: str) -> dict[str, Any] | None:
    """What `mergekit-karcher fisher` said of a metric in a folder here."""
    try:
        found: dict[str, Any] = json.loads((Path(metric) / "metric.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found


def has_metric(merge: Any) -> bool:
    """Whether a merge task is to weigh parameters: by what any of its inputs says."""
    return bool(merge.method_name == NAME or any(metric for _, _, metric in _asked(merge)))


def metric_loads(merge: Any) -> Loads:
    """The tasks that load the metrics of a merge task's inputs; raises unless all are there."""
    if not has_metric(merge):
        return ()
    name = merge.output_weight.name
    permuted = hasattr(merge.gather_tensors, "gather_tensors")
    found = []
    for model, load, metric in _asked(merge):
        if metric == IDENTITY:
            continue
        if not metric:
            apart = " (or origin: base, where the base takes no part)"
            raise KarcherError(
                f"{name} needs a metric for {model}: give the folder or file of one under its "
                "parameters, in the list of models, or metric: identity"
                f"{apart if model == merge.base_model else ''}."
            )
        if permuted:
            raise KarcherError(
                f"The tokenizer setting changes the vocabulary of {name}, which a metric cannot "
                f"follow: give every model metric: identity for it by a filter, or leave that "
                "setting out."
            )
        names = names_of(load)
        own = _opened(metric, str(model)).index.tensor_paths
        there = next((own_name for own_name in names if own_name in own), None)
        stacked = None
        if there is None:
            kind = model_type_of(load)
            there = next((n for n in names if _can_be_made(n, kind, own)), None)
            stacked = kind
        if there is None:
            if is_buffer(load):
                continue
            raise KarcherError(
                f"The metric {metric} of {model} has no {names[0]}: make it anew from that model, "
                "or give metric: identity for it by a filter."
            )
        load_metric = _task_types().LoadMetric(
            metric=metric, tensor=there, model_type=stacked, label=merge.group_label()
        )
        found.append((str(model), load_metric))
    return tuple(found)


def _can_be_made(name: str, model_type: str | None, parts: Mapping[str, Any]) -> bool:
    """Whether a tensor is in parts in the checkpoints of that type of model, experts say."""
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    return bool(can_convert_checkpoint_keys(model_type, set(parts), name))


def _asked(merge: Any) -> Iterator[tuple[Any, Any, str]]:
    """The inputs that count, what loads each of them, and the metric that it is to have."""
    for model, load in loads_of(merge):
        own = merge.input_parameters[model]
        apart = merge.parameters["origin"] == "base" and model == merge.base_model
        if own["weight"] > 0 and not apart and found_by(load):
            yield model, load, own["metric"]


def asked_of(loads: Loads) -> dict[str, Any]:
    """Those tasks as further arguments of one that merges."""
    return {f"{METRICS} {model}": load for model, load in loads}


def metrics_of(merge: Any, loaded: Mapping[str, Any]) -> dict[Any, Any]:
    """What they have loaded, by the model of the merge task."""
    models = {f"{METRICS} {model}": model for model in merge.model_order}
    return {models[key]: tensor for key, tensor in loaded.items()}


def _opened(metric: str, model: str) -> Any:
    from mergekit.common import ModelReference
    from mergekit.io import LazyTensorLoader, ShardedTensorIndex

    if metric not in _loaders:
        try:
            if Path(metric).is_file():
                index = ShardedTensorIndex.from_file(metric)
                _loaders[metric] = LazyTensorLoader(index)
            else:
                _loaders[metric] = ModelReference.parse(metric).lazy_loader()
        except Exception as error:
            raise KarcherError(
                f"The metric {metric} of {model} cannot be opened ({first_line(error)}): "
                "give a folder or file of safetensors, or a Hub id."
            ) from None
    return _loaders[metric]
