"""Merge tasks in the plans that mergekit makes: what they read, and others in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def with_merges_replaced(tasks: Sequence[Any], new: Mapping[int, Any]) -> list[Any]:
    """A plan with other tasks in the place of its merge tasks, by the id of what they replace."""
    changed = {
        id(task): task.model_copy(update={"tensor_task": new[id(task.tensor_task)]})
        for task in tasks
        if id(getattr(task, "tensor_task", None)) in new
    }
    result = []
    for task in tasks:
        if hasattr(task, "tensor_save_tasks"):
            saves = tuple(changed.get(id(save), save) for save in task.tensor_save_tasks)
            result.append(task.model_copy(update={"tensor_save_tasks": saves}))
        else:
            result.append(changed.get(id(task), task))
    return result


def loads_of(task: Any) -> Iterator[tuple[Any, Any]]:
    """The tasks that load the inputs of a merge task, with their models."""
    gather = task.gather_tensors
    while hasattr(gather, "gather_tensors"):
        gather = gather.gather_tensors
    if hasattr(gather, "tensors"):  # of mergekit-pytorch
        yield from gather.tensors.items()
    else:
        yield from ((load.model, load) for load in gather.arguments().values())


def found_by(load: Any) -> bool:
    """Whether a checkpoint has what a load task is to find, or must have it."""
    if _is_raw(load):
        return _place(load) in _loader(load).index.tensor_paths
    return not load.optional or _place(load) is not None


def names_of(load: Any) -> list[str]:
    """The names under which a load task looks for its tensor, the first that is there."""
    if _is_raw(load):
        return [load.tensor_name]
    return [load.tensor, *(load.aliases or ()), *(load.tied_names or ())]


def model_type_of(load: Any) -> str | None:
    """What the model of a load task is called in transformers; None for a raw checkpoint."""
    if _is_raw(load):
        return None
    from mergekit.io.tasks import LoaderCache

    config = load.model.config(trust_remote_code=LoaderCache().trust_remote_code)
    kind: str = config.model_type
    return kind


def is_buffer(load: Any) -> bool:
    """Whether a checkpoint has whole numbers there, which no method of ours merges; reads them."""
    place = _place(load)
    return place is not None and not _loader(load).get_tensor(place).is_floating_point()


def _is_raw(load: Any) -> bool:
    """Whether it is a task of mergekit-pytorch."""
    return hasattr(load, "tensor_name")


def _place(load: Any) -> str | None:
    """The name under which a checkpoint has a tensor."""
    if _is_raw(load):
        return str(load.tensor_name)
    name: str | None = load._resolve_name(_loader(load))
    return name


def _loader(load: Any) -> Any:
    if _is_raw(load):
        from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache as Cache
    else:
        from mergekit.io.tasks import LoaderCache as Cache
    return Cache().get(load.model)


def only_tied(task: Any) -> bool:
    """Whether every model has this tensor only as another one that it is tied to."""
    tied = [(load, getattr(load, "tied_names", None) or ()) for _, load in loads_of(task)]
    return all(names and _place(load) in names for load, names in tied)
