"""What we use of mergekit that is not its public API, each behind a name of ours.

`check` says what has moved. Nothing outside of `host` imports mergekit.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from packaging.specifiers import SpecifierSet

from mergekit_karcher.errors import KarcherError

# The versions of mergekit that this was written for.
SUPPORTED = SpecifierSet(">=0.1.5,<0.2", prereleases=True)

# What marks a function as ours, and holds the one that it stands for.
_MARK = "_mergekit_karcher_replaces"

# The names that a module must have once it is complete; a trailing part is a field of a task.
_REQUIRED = {
    "mergekit.merge_methods.karcher": ["karcher_merge_method"],
    "mergekit.merge_methods.registry": ["_METHODS", "get", "register"],
    "mergekit.options": ["MergeOptions.apply_global_options"],
    "mergekit.merge_methods.task_adapter": [
        "TensorDictWrapper",
        "ExecuteMergeMethodTask.gather_tensors",
        "ExecuteMergeMethodTask.model_order",
        "ExecuteMergeMethodTask.base_model",
        "ExecuteMergeMethodTask.output_weight",
        "ExecuteMergeMethodTask.parameters",
        "ExecuteMergeMethodTask.input_parameters",
        "ExecuteMergeMethodTask.dtype",
        "ExecuteMergeMethodTask.out_dtype",
    ],
    "mergekit.io.tasks": [
        "LoaderCache.get",
        "LoaderCache.loaders",
        "LoadTensor._resolve_name",
        "GatherTensors.weight_info",
        "SaveTensor.tensor_task",
        "SaveTensor.dtype",
        "ReturnTensor.tensor_task",
        "FinalizeModel.tensor_save_tasks",
    ],
    "mergekit.architecture.conversion": ["convert_checkpoint_tensors"],
    "mergekit.config": ["MergeConfiguration.model_validate", "ConditionalParameter.filter"],
    "mergekit.plan": ["MergePlanner.plan_to_disk", "MergePlanner.plan_in_memory"],
    "mergekit.merge": ["run_merge", "Executor", "MultiGPUExecutor"],
    "mergekit.scripts.merge_raw_pytorch": [
        "plan_flat_merge",
        "RawPyTorchMergeConfig",
        "SimpleLoaderCache.get",
        "SimpleLoadTensor.model",
        "SimpleLoadTensor.tensor_name",
    ],
}


def installed_version() -> str | None:
    """The version of mergekit that is installed, or None."""
    try:
        return importlib.metadata.version("mergekit")
    except importlib.metadata.PackageNotFoundError:
        return None


def check(*modules: str) -> None:
    """Check that modules of mergekit have what we use of them.

    Arguments:
        modules: Names of modules; they are imported if they are not there yet.

    Raises:
        KarcherError: If anything has moved; the message names it.
    """
    moved = []
    for module in modules:
        for name in _REQUIRED[module]:
            if not _has(importlib.import_module(module), name):
                moved.append(f"{module}.{name}")
    if moved:
        raise KarcherError(f"mergekit has no {', '.join(moved)} any more")


def _has(holder: Any, name: str) -> bool:
    first, _, rest = name.partition(".")
    if first in getattr(holder, "model_fields", {}):
        return True
    return hasattr(holder, first) and (not rest or _has(getattr(holder, first), rest))


def table_of(registry: Any) -> dict[str, Any]:
    """The table of merge methods by name; mergekit before 0.1.5 called it otherwise.

    Raises:
        KarcherError: If the registry has no table that we know.
    """
    for name in ("_METHODS", "REGISTERED_MERGE_METHODS"):
        table = getattr(registry, name, None)
        if isinstance(table, dict):
            return table
    raise KarcherError("mergekit has no mergekit.merge_methods.registry._METHODS any more")


def put_in_place_of(holder: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    """Put a function of ours in the place of one of mergekit's, once.

    Arguments:
        holder: The class or module that has the function.
        name: What it is called there.
        make: Makes ours from mergekit's.
    """
    theirs = getattr(holder, name)
    if hasattr(theirs, _MARK):
        return
    ours = functools.wraps(theirs)(make(theirs))
    setattr(ours, _MARK, theirs)
    of_the_class = getattr(theirs, "__self__", None) is holder
    setattr(holder, name, staticmethod(ours) if of_the_class else ours)


def original(function: Any) -> Any:
    """mergekit's own function, whether one of ours stands in its place or not."""
    return getattr(function, _MARK, function)


def method_of(planner: Any) -> Any:
    """The merge method of a `MergePlanner`."""
    return planner._method


def resolved_name(load: Any, loader: Any) -> str | None:
    """The name under which a checkpoint has the tensor of a `LoadTensor` task, or None."""
    name: str | None = load._resolve_name(loader)
    return name


def _conversions(model_type: str | None) -> list[Any]:
    """What transformers does with a family's checkpoints to get the tensors of its networks."""
    mapping: Any = importlib.import_module("transformers.conversion_mapping")
    if model_type is None:
        return []
    return mapping.get_checkpoint_conversion_mapping(model_type) or []


def conversion_sources(model_type: str | None, names: Iterable[str]) -> dict[str, list[str]]:
    """What transformers makes of the tensors of a checkpoint: for each the names of its sources.

    Arguments:
        model_type: What transformers calls the family; None for a raw checkpoint.
        names: The tensors of the checkpoint.

    Returns:
        The sources of each tensor that is renamed or put together from others.
    """
    transforms = _conversions(model_type)
    targets: dict[str, list[str]] = defaultdict(list)
    for name in names if transforms else ():
        reached = {name}
        for transform in transforms:
            for key in tuple(reached):
                renamed, pattern = transform.rename_source_key(key)
                if pattern is not None:
                    reached |= _expanded(renamed, transform.target_patterns)
        for target in reached - {name}:
            targets[target].append(name)
    return targets


def _expanded(renamed: str, patterns: Sequence[str]) -> set[str]:
    """The tensors that one is split into, which transformers gives by the name of the first."""
    if not patterns or patterns[0] not in renamed:
        return {renamed}
    before, _, after = renamed.partition(patterns[0])
    return {before + pattern + after for pattern in patterns}
