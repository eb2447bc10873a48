"""The metrics that a config names: opened for one plan, and loaded beside the weights."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.graph import Task

from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.host import compat
from mergekit_karcher.host.activation_metrics import KIND, ActivationMetrics
from mergekit_karcher.host.checkpoints import open_checkpoint
from mergekit_karcher.host.documents import IDENTITY
from mergekit_karcher.host.graph import (
    changes_vocabulary,
    has_metric,
    is_buffer,
    model_type_of,
    named_metrics,
    names_of,
)
from mergekit_karcher.host.run import FISHER_NAMES, REGMEAN

_LOG = logging.getLogger(__name__)


class MetricFile:
    """A metric that is open; equal only to itself.

    Arguments:
        reference: A folder or file of safetensors, or a Hub id.
        model: Whose it is, for messages.
        cache: Where models from the Hub are kept.

    Raises:
        KarcherError: If it cannot be opened.
    """

    def __init__(self, reference: str, model: str, cache: str | None) -> None:
        self.reference = reference
        self._targets: dict[str | None, dict[str, list[str]]] = {}
        try:
            opened = open_checkpoint(reference, cache)
        except Exception as error:
            raise KarcherError(
                f"The metric {reference} of {model} cannot be opened ({first_line(error)}): "
                "give a folder or file of safetensors, or a Hub id."
            ) from None
        self.loader = opened.loader
        # A file may lie beside the metric.json of another metric.
        about = None if Path(reference).is_file() else _about(opened.folder)
        self.activations: ActivationMetrics | None = None
        if about is not None and about.get("kind") == KIND:
            self.activations = ActivationMetrics(self.loader, about, reference)

    @property
    def names(self) -> Collection[str]:
        """The tensors that it has a metric of."""
        if self.activations is not None:
            return self.activations.names
        paths: Mapping[str, str] = self.loader.index.tensor_paths
        return paths

    def targets(self, model_type: str | None) -> dict[str, list[str]]:
        """What a family puts together from the tensors of the metric: for each its parts."""
        if model_type not in self._targets:
            self._targets[model_type] = compat.conversion_sources(model_type, self.names)
        return self._targets[model_type]


class LoadMetric(Task[Any]):  # type: ignore[misc]
    """One tensor of a metric, by the name that the model's checkpoint has for it.

    model_type: of a model whose checkpoints have that tensor in parts, under other names.
    """

    file: Any
    tensor: str
    model_type: str | None
    label: str | None

    @property
    def is_needed(self) -> bool:
        """Whether it is another metric than one everywhere."""
        activations = self.file.activations
        return activations is None or not activations.is_one(self.sources)

    def arguments(self) -> dict[str, Any]:
        return {}

    def priority(self) -> int:
        return -1000

    def group_label(self) -> str | None:
        return self.label

    @property
    def sources(self) -> Sequence[str]:
        """The names that the metric's own files have for it."""
        if self.model_type is None:
            return [self.tensor]
        sources: Sequence[str] = self.file.targets(self.model_type)[self.tensor]
        return sources

    def execute(self, **_: Any) -> Any:
        if self.file.activations is not None:
            return self.file.activations.metric(self.tensor, self.model_type, self.sources)
        get = self.file.loader.get_tensor
        if self.model_type is None:
            tensor: torch.Tensor = get(self.tensor)
            return tensor
        parts = {name: partial(get, name) for name in self.sources}
        whole: torch.Tensor | None = convert_checkpoint_tensors(self.model_type, parts, self.tensor)
        if whole is None:
            raise KarcherError(
                f"{self.tensor} cannot be put together from the metric {self.file.reference}: make "
                "it anew from its model."
            )
        return whole


# For each model that has a metric of a tensor, the model and the task that loads it.
MetricLoads = tuple[tuple[Any, LoadMetric], ...]


class MetricFiles:
    """The metrics of one plan, each opened once.

    Arguments:
        cache: Where models from the Hub are kept.
    """

    def __init__(self, cache: str | None) -> None:
        self._cache = cache
        self._files: dict[str, MetricFile] = {}

    def loads(self, merge: Any) -> MetricLoads:
        """The tasks that load the metrics of a merge task's inputs.

        Arguments:
            merge: A merge task of ours, as mergekit planned it.

        Returns:
            One for each model with a metric, in the order of the models.

        Raises:
            KarcherError: If the merge has metrics and one of them is not named, cannot be opened,
                or lacks the tensor; or if a tokenizer setting changes the vocabulary.
        """
        if not has_metric(merge):
            return ()
        named = [*named_metrics(merge)]
        loads = [
            (model, self._load(merge, model, load, metric))
            for model, load, metric in named
            if metric != IDENTITY
        ]
        self._check_kinds(merge, {model: metric for model, _, metric in named})
        return tuple((model, load) for model, load in loads if load is not None and load.is_needed)

    def _load(self, merge: Any, model: Any, load: Any, metric: str) -> LoadMetric | None:
        """The task that loads one metric; None for a buffer, which none is needed for."""
        name = merge.output_weight.name
        if not metric:
            without_base = " (or origin: base, where the base takes no part)"
            raise KarcherError(
                f"{name} needs a metric for {model}: give the folder or file of one under its "
                "parameters, in the list of models, or metric: identity"
                f"{without_base if model == merge.base_model else ''}."
            )
        if changes_vocabulary(merge):
            raise KarcherError(
                f"The tokenizer setting changes the vocabulary of {name}, which a metric cannot "
                f"follow: give every model metric: identity for it by a filter, or leave that "
                "setting out."
            )
        file = self._opened(metric, str(model))
        names = names_of(load)
        label = merge.group_label()
        whole = next((name for name in names if name in file.names), None)
        if whole is not None:
            return LoadMetric(file=file, tensor=whole, model_type=None, label=label)
        model_type = model_type_of(load)
        targets = file.targets(model_type)
        in_parts = (n for n in names if n in targets)
        stacked = next(in_parts, None)
        if stacked is not None:
            return LoadMetric(file=file, tensor=stacked, model_type=model_type, label=label)
        if is_buffer(load):
            return None
        raise KarcherError(
            f"The metric {metric} of {model} has no {names[0]}: make it anew from that model, "
            "or give metric: identity for it by a filter."
        )

    def _check_kinds(self, merge: Any, metrics: Mapping[Any, str]) -> None:
        """Raise if metrics of activations are mixed with others, or given to another method."""
        of_activations = [
            model
            for model, metric in metrics.items()
            if metric in self._files and self._files[metric].activations is not None
        ]
        other = next((model for model in metrics if model not in of_activations), None)
        if merge.method_name == REGMEAN and other is not None:
            raise KarcherError(
                f"regmean takes metrics from activations only, and the metric {metrics[other]} of "
                f"{other} is none: make one by mergekit-karcher fisher --kind activations, or "
                "take merge_method: fisher."
            )
        if not of_activations:
            return
        first, name = of_activations[0], merge.output_weight.name
        if merge.method_name not in FISHER_NAMES:
            raise KarcherError(
                f"The metric {metrics[first]} of {first} is of activations, which "
                f"{merge.method_name} has no use for: take merge_method: fisher, or diagonal "
                "metrics."
            )
        if other is not None:
            raise KarcherError(
                f"{name} has a metric of activations for {first}, but {metrics[other] or 'none'} "
                f"for {other}, whose scales have nothing to do with each other: give all models "
                "metrics of one kind."
            )

    def _opened(self, metric: str, model: str) -> MetricFile:
        if metric not in self._files:
            self._files[metric] = MetricFile(metric, model, self._cache)
        return self._files[metric]


def warn_of_mixed_metrics(merges: Sequence[Any]) -> None:
    """Warn where metric.json says that metrics of a merge do not belong together.

    Arguments:
        merges: The merge tasks of a plan.
    """
    used = {(str(model), metric) for merge in merges for model, _, metric in named_metrics(merge)}
    made: dict[str, str] = {}
    models = {os.path.realpath(model): model for model, _ in used}
    for model, metric in sorted(used):
        about = _about(Path(metric))
        if about is None:
            continue
        made[model] = ", ".join(str(about[key]) for key in ("kind", "length") if key in about)
        made_from = models.get(os.path.realpath(about.get("model", "")))
        if made_from is not None and made_from != model:
            _LOG.warning("The metric %s of %s was made of %s.", metric, model, made_from)
    if len(set(made.values())) > 1:
        _LOG.warning(
            "The metrics of this merge were made in different ways (%s): their scales differ, and "
            "act like weights.",
            "; ".join(f"{model}: {how}" for model, how in made.items()),
        )


def _about(folder: Path) -> dict[str, Any] | None:
    """What `mergekit-karcher fisher` said of a metric in a local folder."""
    try:
        about: dict[str, Any] = json.loads((folder / "metric.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None
