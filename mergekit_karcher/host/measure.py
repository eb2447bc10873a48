"""The report on a config without its merge: mergekit's planner and loaders, and one pass."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from tqdm import tqdm

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host import compat
from mergekit_karcher.host.checkpoints import restricted_unpickling
from mergekit_karcher.host.checks import NAMES
from mergekit_karcher.host.documents import named_in, read_config
from mergekit_karcher.host.graph import around_base_if_in_changes, merge_tasks
from mergekit_karcher.host.install import register
from mergekit_karcher.host.places import check_places
from mergekit_karcher.host.run import FISHER_NAMES, KARCHER
from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.report.build import build
from mergekit_karcher.report.schema import Report

# Our methods, which a report sees as they are; others are seen as karcher would merge their models.
_OURS = (*NAMES, *FISHER_NAMES)

_LOG = logging.getLogger(__name__)

_REASONS_SHOWN = 5

# What karcher reads of the config of another method.
_SHARED_WITH_OTHERS = ("weight",)


def report_on(path: Path, options: Any) -> Report:
    """Read a config and all its weights once, and report.

    Arguments:
        path: A config of mergekit-yaml or mergekit-pytorch, of any merge method: of another one the
            models are taken, their weights without sign, and the base, as origin of the tensors
            that two more models share with it.
        options: mergekit's `MergeOptions`.

    Returns:
        The report. One tensor of each model is held at a time.

    Raises:
        KarcherError: For what a merge with our method would refuse.
    """
    return report_on_document(read_config(path), path.name, path.parent, options)


def report_on_document(document: dict[str, Any], name: str, folder: Path, options: Any) -> Report:
    """The same for a config that is read already.

    name: What the config is called in messages. folder: where its relative paths begin, for hints.
    """
    register()
    # These need mergekit's own classes, which are there now.
    from mergekit_karcher.host.metric_loads import MetricFiles
    from mergekit_karcher.host.plan import OurTasks, checked_run
    from mergekit_karcher.host.preflight import (
        Checkpoints,
        drops,
        left_out,
        missing_in_some,
        problems,
    )
    from mergekit_karcher.host.report_context import planned_of

    _check_devices(options)
    asked_for = str(document.get("merge_method"))
    _check_method(asked_for)
    config, tasks, sliced = _planned_as_karcher(document, asked_for, folder, options)
    checkpoints = Checkpoints()
    merges = checkpoints.present(merge_tasks(around_base_if_in_changes(tasks), _OURS))
    if not merges:
        raise KarcherError(f"There is nothing to report on in {name}: it merges no tensor.")
    _stop_for([*problems(merges, checkpoints, sliced=sliced)])
    if drops(merges):
        for words in left_out(merges, checkpoints, sliced=sliced):
            _LOG.warning("%s.", words)
    for sentence in missing_in_some(merges, checkpoints):
        _LOG.warning(sentence)
    method = asked_for if asked_for in FISHER_NAMES else KARCHER
    run = checked_run(merges, config, name, method, watched=True)
    planned = planned_of(config, merges, checkpoints.counted_once(merges), asked_for)
    if all(_input_count(merge) < 2 for merge in merges):
        raise KarcherError(
            f"There is nothing to compare in {name}: every tensor comes from one model."
        )
    metrics = MetricFiles(options.transformers_cache)
    ours = OurTasks(run, metrics, checkpoints).means_only(merges)
    results = [*_executed(ours, options)]
    means = dict(run.tally.means)
    if isinstance(results[0], KarcherMean):
        means = dict.fromkeys(run.tally.observations, results[0])
    return build(planned, run.tally.observations, means, run.tally.shares)


def _stop_for(reasons: Sequence[str]) -> None:
    """Raise `KarcherError` with all that would stop a merge."""
    if len(reasons) == 1:
        raise KarcherError(reasons[0])
    if reasons:
        shown = [f"- {reason}" for reason in reasons[:_REASONS_SHOWN]]
        if len(reasons) > len(shown):
            shown.append(f"- and {len(reasons) - len(shown)} more of these kinds")
        listed = "\n".join(shown)
        raise KarcherError(f"{len(reasons)} things would stop this merge:\n{listed}")


def _check_method(name: str) -> None:
    """Raise `KarcherError` if mergekit has no merge method of that name."""
    from mergekit.merge_methods import registry

    known = sorted(compat.table_of(registry))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}."
        raise KarcherError(f"mergekit has no merge_method: {name}; {hint}")


def _check_devices(options: Any) -> None:
    from mergekit.common import get_torch_accelerator_type

    if options.multi_gpu and get_torch_accelerator_type() is None:
        raise KarcherError("--multi-gpu needs a GPU, and torch sees none.")


def _input_count(merge: Any) -> int:
    return len(merge.model_order) - int(merge.parameters["origin"] == "base")


def _planned_as_karcher(
    document: dict[str, Any], asked_for: str, folder: Path, options: Any
) -> tuple[Any, Sequence[Any], bool]:
    """A config, its plan with karcher in the place of another method, whether it names layers."""
    if asked_for not in _OURS:
        document = _stripped(document, _SHARED_WITH_OTHERS) | {"merge_method": KARCHER}
    models = list(named_in(document))
    check_places(models, folder=folder, cache=options.transformers_cache)
    raw = any(os.path.isfile(model) for model in models)
    with restricted_unpickling():
        config, tasks, sliced = (_planned_raw if raw else _planned)(document, options)
    ours = tasks if asked_for in _OURS else [_as_ours(task) for task in tasks]
    return config, ours, sliced


def _as_ours(task: Any) -> Any:
    """A planned task of another method's config with an origin and weights that ours can use."""
    from mergekit.common import ImmutableMap

    merge = getattr(task, "tensor_task", None)
    if merge is None:
        return task
    around_base = merge.base_model in merge.model_order and len(merge.model_order) > 2
    # Other methods have no parameter to say so by, and nothing that stops them.
    parameters = {
        **dict(merge.parameters.items()),
        "origin": "base" if around_base else "zero",
        "left_out": "drop",
    }
    weights = {m: abs(values["weight"]) for m, values in merge.input_parameters.items()}
    counted = [w for m, w in weights.items() if not (around_base and m == merge.base_model)]
    if not any(counted):
        weights = dict.fromkeys(weights, 1.0)
    inputs = {
        model: ImmutableMap(
            data={"weight": weight, "metric": merge.input_parameters[model]["metric"]}
        )
        for model, weight in weights.items()
    }
    changed = {
        "parameters": ImmutableMap(data=parameters),
        "input_parameters": ImmutableMap(data=inputs),
    }
    return task.model_copy(update={"tensor_task": merge.model_copy(update=changed)})


def _stripped(part: Any, shared: Sequence[str]) -> Any:
    if isinstance(part, list):
        return [_stripped(item, shared) for item in part]
    if not isinstance(part, dict):
        return part
    return {
        key: {k: v for k, v in (value or {}).items() if k in shared}
        if key == "parameters"
        else _stripped(value, shared)
        for key, value in part.items()
    }


def _planned(document: dict[str, Any], options: Any) -> tuple[Any, Sequence[Any], bool]:
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.plan import MergePlanner

    from mergekit_karcher.host.config_checks import check_modules, check_settings
    from mergekit_karcher.host.plan import dequantise, names_layers, planning

    config = _validated(MergeConfiguration, document)
    models = config.referenced_models()
    cache = LoaderCache()
    cache.setup(options=options)
    dequantise(cache, tqdm(models, desc="Warmup loader cache", disable=options.quiet))
    with planning():
        planner = MergePlanner(
            config,
            get_architecture_info(config, options),
            options=options,
            out_model_config=models[0].config(trust_remote_code=options.trust_remote_code),
        )
    check_settings(config, compat.method_of(planner).spec)
    check_modules(config, planner.arch_info.modules)
    sliced = names_layers(config)
    # Without what is added to the plan of a merge. The tasks that would write are not run.
    # (plan_in_memory of mergekit 0.1.5 does not validate its own tasks.)
    with planning():
        tasks = compat.original(MergePlanner.plan_to_disk)(planner, "")
    return config, tasks, sliced


def _planned_raw(document: dict[str, Any], options: Any) -> tuple[Any, Sequence[Any], bool]:
    from mergekit import merge_methods
    from mergekit.scripts import merge_raw_pytorch

    from mergekit_karcher.host.config_checks import check_settings
    from mergekit_karcher.host.plan import dequantise_raw, planning

    config = _validated(merge_raw_pytorch.RawPyTorchMergeConfig, document)
    check_settings(config, merge_methods.get(config.merge_method).spec)
    dequantise_raw(merge_raw_pytorch.SimpleLoaderCache(), config, options)
    plan = compat.original(merge_raw_pytorch.plan_flat_merge)
    quiet = contextlib.redirect_stderr(io.StringIO()) if options.quiet else contextlib.nullcontext()
    with quiet, planning():
        tasks = plan(config, "", tensor_union=True, tensor_intersection=False, options=options)
    return config, tasks, False


def _validated(kind: Any, document: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = f"The config is not one that mergekit reads: {place}: {first['msg']}."
        raise KarcherError(message) from None


def _executed(tasks: Sequence[Any], options: Any) -> Iterator[Any]:
    from mergekit.graph import Executor
    from mergekit.multigpu_executor import MultiGPUExecutor

    if options.multi_gpu:
        storage = None if options.low_cpu_memory else "cpu"
        executor = MultiGPUExecutor(targets=tasks, storage_device=storage)
    else:
        executor = Executor(targets=tasks, math_device=options.device)
    for _, value in executor.run(quiet=options.quiet):
        yield value


def dtype_of(model: str, options: Any) -> str | None:
    """mergekit's name for the dtype that a model's config gives; None for a file of tensors."""
    from mergekit.common import ModelReference

    if os.path.isfile(model):
        return None
    reference = ModelReference.model_validate(model)
    config = reference.config(trust_remote_code=options.trust_remote_code)
    return str(getattr(config, "dtype", None) or torch.bfloat16).removeprefix("torch.")
