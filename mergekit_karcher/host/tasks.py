"""Our tasks in mergekit's graph. Imported once mergekit's own classes are there.

A merge of whole models reads everything twice:

    load -> gather -> inner products, for each tensor
                      all of them -> mean
    load -> gather -> merge with that mean, for each tensor

The second loads are other tasks than the first, and come after the mean: as the same ones, or any
earlier, mergekit's executor would hold all tensors of all models in between.
"""

# Tasks are pydantic models, which read annotations: they must be real ones here.
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mergekit import merge_methods
from mergekit.common import dtype_from_name
from mergekit.graph import Task
from mergekit.merge_methods.base import PerInputValues, TensorEntry, TensorGroup, TensorMetadata
from mergekit.merge_methods.dtype import align_dtype
from mergekit.tokenizer import BuildTokenizer

from mergekit_karcher.errors import NotFiniteError
from mergekit_karcher.host.checks import check_casts, weights_of
from mergekit_karcher.host.graph import changes_tokens, uncast
from mergekit_karcher.host.headers import identical, is_parameter_by_name
from mergekit_karcher.host.metric_loads import MetricLoads
from mergekit_karcher.host.parameters import settings_of
from mergekit_karcher.host.rows import RowLayout
from mergekit_karcher.host.tensor import TensorToMerge
from mergekit_karcher.means.products import Products, total
from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.means.solve import mean_of_products
from mergekit_karcher.report.build import Planned, build
from mergekit_karcher.report.store import write
from mergekit_karcher.sphere.results import Status

_LOG = logging.getLogger(__name__)


class OfInputs(Task[Any]):  # type: ignore[misc]
    """What is done with the inputs of one output tensor.

    merge: mergekit's own task for that tensor, which says what to do.
    metrics: loads the metrics of its inputs; None if it is to have none.
    run: the `MergeRun` that it is part of.
    is_constant, is_whole_numbers: what the inputs are by their headers.
    rows: where the output units of the weight lie.
    is_layer: whether the weight is multiplied with the inputs of a layer.
    """

    merge: Task
    metrics: MetricLoads | None
    run: Any
    is_constant: bool
    is_whole_numbers: bool
    rows: RowLayout
    is_layer: bool

    @property
    def gather(self) -> Any:
        """The task that gathers the inputs; whole numbers as they are, which a cast would round."""
        gather = self.merge.gather_tensors
        return uncast(gather) if self.is_whole_numbers else gather

    def arguments(self) -> dict[str, Any]:
        arguments = {f"metric {model}": load for model, load in self.metrics or ()}
        if self.merge.parameters["origin"] == "base" and changes_tokens(self.merge):
            arguments["tokenizer"] = self.merge.gather_tensors.tokenizer_task
        return {"tensors": self.gather, **arguments}

    def group_label(self) -> Any:
        return self.merge.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, tensors: Mapping[Any, torch.Tensor], **loaded: Any) -> Any:
        merge = self.merge
        method = merge_methods.get(merge.method_name)
        group = TensorGroup(
            tuple(
                TensorEntry(model, tensors[model], is_base=model == merge.base_model)
                for model in merge.model_order
                if tensors.get(model) is not None
            ),
            TensorMetadata.from_weight_info(merge.output_weight),
        )
        method.validate_inputs(
            [entry.id for entry in group.entries],
            merge.base_model,
            group_name=merge.output_weight.name,
        )
        if self.is_whole_numbers or (self.is_constant and identical(group.tensors)):
            return self.of_buffer(group.tensors[0].clone())
        group.validate_tensors()
        parameters = dict(merge.parameters.items())
        for name in ("weight", "metric"):
            values = [(e.id, merge.input_parameters[e.id][name]) for e in group.entries]
            parameters[name] = PerInputValues(values)
        metrics = None
        if self.metrics is not None:
            metrics = {model: loaded[f"metric {model}"] for model, _ in self.metrics}
        aligned = align_dtype(group, dtype_from_name(merge.dtype))
        tokens = self.tokens_of_base(loaded.get("tokenizer"), aligned)
        known = aligned if tokens is None else self.at_tokens(aligned, tokens)
        tensor = TensorToMerge(known, parameters, self.run, metrics, self.rows, self.is_layer)
        with torch.autocast(device_type=group.tensors[0].device.type, enabled=False):
            try:
                result = self.of_tensor(method, tensor, loaded.get("mean"))
                return result if tokens is None else self.of_all_tokens(result, aligned, tokens)
            except NotFiniteError:
                if identical(group.tensors) and not is_parameter_by_name(tensor.name):
                    return self.of_buffer(group.tensors[0].clone())
                check_casts(merge)
                raise

    def of_buffer(self, buffer: torch.Tensor) -> Any:
        """What comes of a tensor that all inputs agree on and that is no parameter."""
        return None

    def tokens_of_base(self, tokenizer: Any, group: TensorGroup) -> torch.Tensor | None:
        """The tokens that the base has, (tokens,) int64; None if it has all, or if that is moot.

        mergekit gives the base the average of the others for a token that it lacks, unless the
        config says what else. The differences from that cancel: they have no mean direction.
        """
        if tokenizer is None or group.base is None:
            return None
        ids = tokenizer.tokenizer.get_vocab()
        given = {ids[token] for token in self.merge.gather_tensors.tokens or () if token in ids}
        places = tokenizer.permutations[self.merge.base_model]
        lacking = [token for token, place in places.items() if place < 0 and token not in given]
        if not lacking:
            return None
        known = torch.ones(group.base.tensor.shape[self.merge.output_weight.vocabulary_axis])
        known[lacking] = 0
        return known.nonzero().reshape(-1).to(group.base.tensor.device)

    def at_tokens(self, group: TensorGroup, tokens: torch.Tensor) -> TensorGroup:
        """A group at some tokens of its vocabulary."""
        axis = self.merge.output_weight.vocabulary_axis
        entries = (
            TensorEntry(e.id, e.tensor.index_select(axis, tokens), is_base=e.is_base)
            for e in group.entries
        )
        return TensorGroup(tuple(entries), group.metadata)

    def of_all_tokens(self, result: Any, group: TensorGroup, tokens: torch.Tensor) -> Any:
        """What comes of all tokens, given what comes of those that the base has."""
        return result

    @abstractmethod
    def of_tensor(self, method: Any, tensor: TensorToMerge, mean: Any) -> Any:
        """What comes of floating-point inputs."""


class TensorProducts(OfInputs):
    """The inner products of the inputs of one output tensor; None for a buffer."""

    def of_tensor(self, method: Any, tensor: TensorToMerge, mean: Any) -> Products:
        products: Products = method.products(tensor)
        return products


class TensorMean(OfInputs):
    """The mean of the inputs of one output tensor, told to the run and not combined."""

    def of_tensor(self, method: Any, tensor: TensorToMerge, mean: Any) -> None:
        method.measure(tensor)


class ModelMean(Task[KarcherMean]):  # type: ignore[misc]
    """The mean of whole models. Equal only to itself: comparing its parts is slow."""

    parts: tuple[TensorProducts, ...]

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def arguments(self) -> dict[str, Any]:
        return {str(index): part for index, part in enumerate(self.parts)}

    def execute(self, **products: Any) -> KarcherMean:
        first = self.parts[0].merge
        weights = np.array([weight for weight in weights_of(first).values() if weight > 0])
        parts = [part for part in products.values() if part is not None]
        mean = mean_of_products(total(parts), weights, settings_of(first.parameters))
        if mean.status is Status.ZERO:
            _LOG.warning("The whole model: %s.", mean.status.value)
        return mean


class AfterMean(Task[Any]):  # type: ignore[misc]
    """A task that mergekit planned, done once more when the mean is known."""

    task: Task
    mean: ModelMean

    def arguments(self) -> dict[str, Any]:
        tasks = {
            name: task if isinstance(task, BuildTokenizer) else AfterMean(task=task, mean=self.mean)
            for name, task in self.task.arguments().items()
        }
        return tasks or {"mean": self.mean}

    def execute(self, **arguments: Any) -> Any:
        return self.task.execute(**{k: v for k, v in arguments.items() if k != "mean"})

    def priority(self) -> int:
        return int(self.task.priority())

    def group_label(self) -> Any:
        return self.task.group_label()


class MergeTensor(OfInputs):
    """One output tensor of a merge of ours.

    mean: gives the mean of whole models, which is then taken instead of the tensor's.
    saved_as: the dtype that the tensor is saved in, by mergekit's name for it; None for its own.
    """

    mean: ModelMean | None
    saved_as: str | None

    def arguments(self) -> dict[str, Any]:
        arguments = super().arguments()
        if self.mean is None:
            return arguments
        gather = AfterMean(task=self.gather, mean=self.mean)
        return {**arguments, "tensors": gather, "mean": self.mean}

    def of_buffer(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer

    def of_tensor(self, method: Any, tensor: TensorToMerge, mean: Any) -> torch.Tensor:
        more = {} if mean is None else {"mean": mean}
        saved_as = dtype_from_name(self.saved_as)
        result: torch.Tensor = method.merge_tensor(tensor, saved_as=saved_as, **more)
        dtype = dtype_from_name(self.merge.out_dtype)
        return result if dtype is None else result.to(dtype)

    def of_all_tokens(
        self, result: torch.Tensor, group: TensorGroup, tokens: torch.Tensor
    ) -> torch.Tensor:
        """The merged tensor, with the weighted linear mean for tokens that the base lacks."""
        axis = self.merge.output_weight.vocabulary_axis
        weights = [self.merge.input_parameters[e.id]["weight"] for e in group.non_base]
        tensors = (entry.tensor.to(torch.float64) for entry in group.non_base)
        total = sum(w * t for w, t in zip(weights, tensors, strict=True)) / sum(weights)
        whole = torch.as_tensor(total).to(result.dtype)
        lacking = whole.shape[axis] - len(tokens)
        self.run.note_tokens_without_base(self.merge.output_weight.name, lacking)
        return whole.index_copy(axis, tokens, result)


class WriteReport(Task[None]):  # type: ignore[misc]
    """Writes the report on a merge when its tensors are saved. Equal only to itself."""

    after: tuple[Task, ...]
    planned: Any
    run: Any
    folder: Path

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def arguments(self) -> dict[str, Any]:
        return {str(index): task for index, task in enumerate(self.after)}

    def main_thread_only(self) -> bool:
        return True

    def execute(self, **_: Any) -> None:
        try:
            report = build(self.planned, self.run.tally.observations, self.run.tally.means)
            for left_out in write(report, self.folder):
                _LOG.warning(left_out)
        except Exception as error:
            # All weights are saved; mergekit has yet to save config and tokenizer.
            _LOG.error("The report was not written to %s: %s.", self.folder, error)
            _LOG.debug("stopped by", exc_info=True)


def report_task(tasks: Sequence[Any], planned: Planned, run: Any, folder: Path) -> WriteReport:
    """The task that writes the report on a plan after the last of its tensors is saved."""
    last = [task for task in tasks if hasattr(task, "tensor_save_tasks")] or tasks
    return WriteReport(after=tuple(last), planned=planned, run=run, folder=folder)
