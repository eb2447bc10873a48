"""One mean for all tensors of a merge: tasks of our own in mergekit's graph.

    load -> gather -> Gram matrix, for each tensor
                      all of them -> mean
    load -> gather -> combine with that mean, for each tensor

The second loads are other tasks than the first, and come after the mean: as the same ones, or any
earlier, mergekit's executor would hold all tensors of all models in between.
"""

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

from mergekit_karcher.host.graph import only_tied, with_merges_replaced
from mergekit_karcher.host.metric_tasks import Loads, asked_of, metric_loads, metrics_of
from mergekit_karcher.means.result import KarcherMean


@cache
def _task_types() -> SimpleNamespace:
    """Our kinds of task, made when mergekit is whole; annotations here are read by pydantic."""
    from mergekit import merge_methods
    from mergekit.common import ImmutableMap
    from mergekit.graph import Task
    from mergekit.merge_methods.base import (
        PerInputValues,
        TensorEntry,
        TensorGroup,
        TensorMetadata,
    )
    from mergekit.tokenizer import BuildTokenizer

    class TensorProducts(Task[Any]):  # type: ignore[misc]
        """The Gram matrix of one merge task's inputs; None for a buffer of whole numbers."""

        merge_task: Task
        loads: Loads

        def arguments(self) -> dict[str, Any]:
            return {"tensors": self.merge_task.gather_tensors, **asked_of(self.loads)}

        def group_label(self) -> Any:
            return self.merge_task.group_label()

        def uses_accelerator(self) -> bool:
            return True

        def execute(self, tensors: dict[Any, Any], **loaded: Any) -> Any:
            task = self.merge_task
            entries = tuple(
                TensorEntry(model, tensor, is_base=model == task.base_model)
                for model in task.model_order
                if (tensor := tensors.get(model)) is not None
            )
            if not any(entry.tensor.is_floating_point() for entry in entries):
                return None
            group = TensorGroup(entries, TensorMetadata.from_weight_info(task.output_weight))
            group.validate_tensors()
            own: dict[str, Any] = {
                name: PerInputValues([(e.id, task.input_parameters[e.id][name]) for e in entries])
                for name in ("weight", "metric")
            }
            own["metrics"] = metrics_of(task, loaded)
            parameters = {**dict(task.parameters.items()), **own}
            return self.result(merge_methods.get(task.method_name), group, parameters)

        def result(self, method: Any, group: TensorGroup, parameters: dict[str, Any]) -> Any:
            return method.products(group, **parameters)

    class TensorMean(TensorProducts):
        """The mean of one merge task's inputs, not combined; None for a buffer."""

        def result(self, method: Any, group: TensorGroup, parameters: dict[str, Any]) -> Any:
            return method.measure(group, **parameters)

    class ModelMean(Task[Any]):  # type: ignore[misc]
        """The mean of the whole model. Equal only to itself: comparing its parts is slow."""

        parts: tuple[TensorProducts, ...]

        def __hash__(self) -> int:
            return id(self)

        def __eq__(self, other: object) -> bool:
            return self is other

        def arguments(self) -> dict[str, Any]:
            return {str(index): part for index, part in enumerate(self.parts)}

        def execute(self, **products: Any) -> KarcherMean:
            first = self.parts[0].merge_task
            out = first.base_model if first.parameters["origin"] == "base" else None
            weights = [first.input_parameters[m]["weight"] for m in first.model_order if m != out]
            mean: KarcherMean = merge_methods.get(first.method_name).mean(
                [part for part in products.values() if part is not None],
                [weight for weight in weights if weight > 0],
                **dict(first.parameters.items()),
            )
            return mean

    class AfterMean(Task[Any]):  # type: ignore[misc]
        """A task that mergekit planned, done once more when the mean is known."""

        task: Task
        mean: ModelMean

        def arguments(self) -> dict[str, Any]:
            own = {
                name: task
                if isinstance(task, BuildTokenizer)
                else AfterMean(task=task, mean=self.mean)
                for name, task in self.task.arguments().items()
            }
            return own or {"mean": self.mean}

        def execute(self, **arguments: Any) -> Any:
            return self.task.execute(**{k: v for k, v in arguments.items() if k != "mean"})

        def priority(self) -> int:
            return int(self.task.priority())

        def group_label(self) -> Any:
            return self.task.group_label()

    class CombineWithMean(Task[Any]):  # type: ignore[misc]
        """One output tensor of a merge task, with the mean of the whole model."""

        merge_task: Task
        mean: ModelMean

        def arguments(self) -> dict[str, Any]:
            gather = AfterMean(task=self.merge_task.gather_tensors, mean=self.mean)
            return {"tensors": gather, "mean": self.mean}

        def group_label(self) -> Any:
            return self.merge_task.group_label()

        def uses_accelerator(self) -> bool:
            return True

        def execute(self, tensors: dict[Any, Any], mean: KarcherMean, **_: Any) -> Any:
            known = ImmutableMap(data={**dict(self.merge_task.parameters.items()), "mean": mean})
            return self.merge_task.model_copy(update={"parameters": known}).execute(tensors=tensors)

    return SimpleNamespace(
        TensorProducts=TensorProducts,
        TensorMean=TensorMean,
        ModelMean=ModelMean,
        CombineWithMean=CombineWithMean,
    )


def means_only(merges: Sequence[Any]) -> list[Any]:
    """Tasks that find the means of a plan's merge tasks, and combine nothing.

    One for each of them, or with granularity model a single one for all.
    """
    types = _task_types()
    if any(task.parameters["granularity"] == "model" for task in merges):
        return [_mean_of(merges)]
    return [types.TensorMean(merge_task=task, loads=metric_loads(task)) for task in merges]


def _mean_of(merges: Sequence[Any]) -> Any:
    types = _task_types()
    parts = tuple(
        types.TensorProducts(merge_task=task, loads=metric_loads(task))
        for task in merges
        if not only_tied(task)
    )
    return types.ModelMean(parts=parts)


def with_one_mean(tasks: Sequence[Any], merges: Sequence[Any]) -> list[Any]:
    """A plan with all its merge tasks replaced by ones that take the mean of the whole model.

    Tied weights, which a checkpoint has once and the plan reads twice, count once.
    """
    types = _task_types()
    mean = _mean_of(merges)
    return with_merges_replaced(
        tasks,
        {id(task): types.CombineWithMean(merge_task=task, mean=mean) for task in merges},
    )
