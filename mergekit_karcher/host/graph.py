"""Reading the plans that mergekit makes, and putting other tasks into them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mergekit_karcher.host import compat
from mergekit_karcher.host.documents import SELF
from mergekit_karcher.host.run import FISHER_NAMES


def merge_tasks(tasks: Iterable[Any], names: Sequence[str]) -> list[Any]:
    """The tasks of a plan that merge a tensor by one of those methods."""
    merges = [getattr(task, "tensor_task", None) for task in tasks]
    return [merge for merge in merges if getattr(merge, "method_name", None) in names]


def with_merges_replaced(tasks: Sequence[Any], new: Mapping[int, Any]) -> list[Any]:
    """A plan with other tasks in the place of its merge tasks.

    Arguments:
        tasks: The plan.
        new: The new tasks, by the id of those that they replace; those without one are dropped.

    Returns:
        The plan, in the same order, with the tasks that save or return what was merged changed.
    """
    changed: dict[int, Any] = {}
    for task in tasks:
        if getattr(task, "tensor_task", None) is None:
            continue
        ours = new.get(id(task.tensor_task))
        # Whole numbers stay what they are: as bfloat16 they would be others.
        dtype = {"dtype": None} if getattr(ours, "is_whole_numbers", False) else {}
        changed[id(task)] = ours and task.model_copy(update={"tensor_task": ours, **dtype})
    result = []
    for task in tasks:
        if hasattr(task, "tensor_save_tasks"):
            saves = (changed.get(id(save), save) for save in task.tensor_save_tasks)
            saved = tuple(save for save in saves if save is not None)
            result.append(task.model_copy(update={"tensor_save_tasks": saved}))
        elif changed.get(id(task), task) is not None:
            result.append(changed.get(id(task), task))
    return result


def around_base_if_in_changes(tasks: Sequence[Any]) -> Sequence[Any]:
    """A plan with origin: base for all tensors if any has the metrics of changes from the base."""
    merges = merge_tasks(tasks, FISHER_NAMES)
    if not any(map(is_in_own_changes, merges)):
        return tasks
    from mergekit.common import ImmutableMap

    around = {}
    for merge in merges:
        parameters = ImmutableMap({**dict(merge.parameters.items()), "origin": "base"})
        around[id(merge)] = merge.model_copy(update={"parameters": parameters})
    return with_merges_replaced(tasks, around)


def saved_dtypes(tasks: Iterable[Any]) -> dict[int, str | None]:
    """The dtype that each merged tensor is saved in, by the id of its merge task."""
    return {
        id(task.tensor_task): task.dtype or getattr(task.tensor_task, "out_dtype", None)
        for task in tasks
        if hasattr(task, "tensor_task")
    }


def loads_of(merge: Any) -> Iterator[tuple[Any, Any]]:
    """The tasks that load the inputs of a merge task, with their models, in the config's order."""
    gather = _innermost_gather(merge)
    if hasattr(gather, "tensors"):  # of mergekit-pytorch
        loads = dict(gather.tensors.items())
    else:
        loads = {load.model: load for load in gather.arguments().values()}
    return ((model, loads[model]) for model in merge.model_order if model in loads)


def weights_read(merge: Any) -> Iterable[tuple[Any, Any]]:
    """What a merge task of mergekit-yaml reads: `WeightInfo` by model."""
    gather = _innermost_gather(merge)
    return gather.weight_info.items() if hasattr(gather, "weight_info") else ()


def named_metrics(merge: Any) -> Iterator[tuple[Any, Any, str]]:
    """The inputs of a merge task that count, what loads each, and the metric that it names.

    None where all metrics are those of the changes from the base, which are not loaded.
    """
    if is_in_own_changes(merge):
        return
    for model, load in loads_of(merge):
        parameters = merge.input_parameters[model]
        is_counted = parameters["weight"] > 0 and not is_outside(merge, model)
        if is_counted and is_in_checkpoint(load):
            yield model, load, parameters["metric"]


def is_in_own_changes(merge: Any) -> bool:
    """Whether a merge task is to take the metric of each input from its change from the base."""
    metrics = (merge.input_parameters[model]["metric"] for model in merge.model_order)
    return merge.method_name in FISHER_NAMES and SELF in metrics


def is_outside(merge: Any, model: Any) -> bool:
    """Whether a model is the base that the mean is taken around, and no input of it."""
    return bool(merge.parameters["origin"] == "base" and model == merge.base_model)


def has_metric(merge: Any) -> bool:
    """Whether a merge task is to weigh parameters: fisher always does, karcher if a model asks."""
    asked = any(metric for _, _, metric in named_metrics(merge))
    return bool(merge.method_name in FISHER_NAMES or asked)


def changes_vocabulary(merge: Any) -> bool:
    """Whether a tokenizer setting permutes or fills up what a merge task reads."""
    return hasattr(merge.gather_tensors, "gather_tensors")


def changes_tokens(merge: Any) -> bool:
    """Whether a tokenizer setting says which token each index of a merge task's inputs is."""
    return hasattr(merge.gather_tensors, "tokenizer_task")


def is_in_checkpoint(load: Any) -> bool:
    """Whether a checkpoint has what a load task is to read, or must have it."""
    if _is_raw(load):
        return _name_in_checkpoint(load) in loader_of(load).index.tensor_paths
    return not load.optional or _name_in_checkpoint(load) is not None


def uncast(gather: Any) -> Any:
    """A gather task that reads its tensors in the dtypes that their files have."""
    if hasattr(gather, "tensors"):  # of mergekit-pytorch
        loads = {m: t.model_copy(update={"dtype": None}) for m, t in gather.tensors.items()}
        return gather.model_copy(update={"tensors": type(gather.tensors)(loads)})
    return gather.model_copy(update={"dtype": None})


def names_of(load: Any) -> list[str]:
    """The names under which a load task looks for its tensor; the first that is there counts."""
    if _is_raw(load):
        return [load.tensor_name]
    return [load.tensor, *(load.aliases or ()), *(load.tied_names or ())]


def model_type_of(load: Any) -> str | None:
    """What the model of a load task is called in transformers; None for a raw checkpoint."""
    if _is_raw(load):
        return None
    model_type: str = _config_of(load).model_type
    return model_type


def ties_head(load: Any) -> bool:
    """Whether the model of a load task has one tensor for embedding and head, by its config."""
    return not _is_raw(load) and bool(getattr(_config_of(load), "tie_word_embeddings", False))


def is_buffer(load: Any) -> bool:
    """Whether a checkpoint has whole numbers there, which are copied; reads the tensor."""
    name = _name_in_checkpoint(load)
    return name is not None and not loader_of(load).get_tensor(name).is_floating_point()


def only_tied(merge: Any) -> bool:
    """Whether every model has this tensor only as another one that it is tied to."""
    tied = [(load, getattr(load, "tied_names", None) or ()) for _, load in loads_of(merge)]
    return all(names and _name_in_checkpoint(load) in names for load, names in tied)


def _config_of(load: Any) -> Any:
    from mergekit.io.tasks import LoaderCache

    return load.model.config(trust_remote_code=LoaderCache().trust_remote_code)


def _innermost_gather(merge: Any) -> Any:
    gather = merge.gather_tensors
    while hasattr(gather, "gather_tensors"):
        gather = gather.gather_tensors
    return gather


def _is_raw(load: Any) -> bool:
    """Whether it is a task of mergekit-pytorch."""
    return hasattr(load, "tensor_name")


def _name_in_checkpoint(load: Any) -> str | None:
    if _is_raw(load):
        return str(load.tensor_name)
    return compat.resolved_name(load, loader_of(load))


def loader_of(load: Any) -> Any:
    """mergekit's loader of the checkpoint that a load task reads."""
    if _is_raw(load):
        from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache as Cache
    else:
        from mergekit.io.tasks import LoaderCache as Cache
    return Cache().get(load.model)
