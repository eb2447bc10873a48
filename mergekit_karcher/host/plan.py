"""The plans of mergekit's commands, checked and rewritten before they run.

Imported once mergekit's own classes are there.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from mergekit.io.tasks import LoaderCache

from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.host import compat
from mergekit_karcher.host.checks import (
    NAMES,
    check_merges,
    check_own_changes,
    check_weights_in,
    warn_of_a_base_that_takes_part,
)
from mergekit_karcher.host.config_checks import (
    check_filters,
    check_modules,
    check_settings,
    settings_in,
)
from mergekit_karcher.host.graph import (
    around_base_if_in_changes,
    changes_vocabulary,
    has_metric,
    is_in_own_changes,
    merge_tasks,
    saved_dtypes,
    weights_read,
    with_merges_replaced,
)
from mergekit_karcher.host.metric_loads import MetricFiles, warn_of_mixed_metrics
from mergekit_karcher.host.preflight import Checkpoints, drops, left_out, problems
from mergekit_karcher.host.quantised import dequantising, without_quantisation
from mergekit_karcher.host.report_context import planned_of, settings_in_effect
from mergekit_karcher.host.run import FISHER_NAMES, KARCHER, MergeRun, announce
from mergekit_karcher.host.tasks import (
    MergeTensor,
    ModelMean,
    OfInputs,
    TensorMean,
    TensorProducts,
    report_task,
)
from mergekit_karcher.report.store import make_folder

_LOG = logging.getLogger(__name__)

_REPORT = "MERGEKIT_KARCHER_REPORT"

T = TypeVar("T", bound=OfInputs)


def patch_planner(planner: Any) -> None:
    """Have the plans that mergekit's `MergePlanner` makes rewritten. Idempotent."""

    def rewriting(plan: Callable[..., Any]) -> Callable[..., Any]:
        def rewritten(self: Any, *arguments: Any, **options: Any) -> Any:
            if self.config.merge_method not in (*NAMES, *FISHER_NAMES):
                _warn_of_no_report(self.config.merge_method)
                return plan(self, *arguments, **options)
            check_settings(self.config, compat.method_of(self).spec)
            check_modules(self.config, self.arch_info.modules)
            sliced = names_layers(self.config)
            dequantise(LoaderCache(), self.config.referenced_models())
            without_quantisation(self.out_model_config)
            with planning():
                tasks = plan(self, *arguments, **options)
            # In memory there is no place that the merge could be called by.
            path = next(iter((*arguments, *options.values())), "in memory")
            return rewrite_plan(tasks, self.config, path, self.options, sliced=sliced)

        return rewritten

    compat.put_in_place_of(planner, "plan_to_disk", rewriting)
    compat.put_in_place_of(planner, "plan_in_memory", rewriting)


def patch_flat_planner(module: Any) -> None:
    """Have the plans of `mergekit-pytorch` rewritten. Idempotent."""

    def rewriting(plan: Callable[..., Any]) -> Callable[..., Any]:
        def rewritten(config: Any, out_path: str, *arguments: Any, **options: Any) -> Any:
            if config.merge_method not in (*NAMES, *FISHER_NAMES):
                _warn_of_no_report(config.merge_method)
                return plan(config, out_path, *arguments, **options)
            check_settings(config, module.merge_methods.get(config.merge_method).spec)
            bound = inspect.signature(plan).bind(config, out_path, *arguments, **options)
            merge_options = bound.arguments["options"]
            dequantise_raw(module.SimpleLoaderCache(), config, merge_options)
            with planning():
                tasks = plan(config, out_path, *arguments, **options)
            return rewrite_plan(tasks, config, out_path, merge_options)

        return rewritten

    compat.put_in_place_of(module, "plan_flat_merge", rewriting)


def rewrite_plan(
    tasks: Sequence[Any], config: Any, out_path: str, options: Any, *, sliced: bool = False
) -> list[Any]:
    """A plan of one of our methods, checked, with our tasks in the place of its merges.

    Arguments:
        tasks: The plan, as mergekit made it.
        config: The config that it was made from.
        out_path: Where the result goes, whose name the summary has.
        options: mergekit's `MergeOptions`.
        sliced: Whether the config names layers itself.

    Returns:
        The plan that is to run.

    Raises:
        KarcherError: For what the config may not ask for, or the plan may not contain.
    """
    tasks = around_base_if_in_changes(tasks)
    title = os.path.basename(os.path.abspath(out_path))
    method = config.merge_method if config.merge_method in FISHER_NAMES else KARCHER
    folder = _report_folder(title) if method == KARCHER else None
    if method != KARCHER:
        _warn_of_no_report(method)
    checkpoints = Checkpoints()
    merges = checkpoints.present(merge_tasks(tasks, (config.merge_method,)))
    if not merges:
        raise KarcherError(
            f"mergekit planned no tensor that merge_method: {config.merge_method} could merge: "
            "upgrade mergekit-karcher if the models have tensors of floating-point numbers."
        )
    for problem in problems(merges, checkpoints, sliced=sliced):
        raise KarcherError(problem)
    run = checked_run(merges, config, title, method, watched=folder is not None)
    if drops(merges):
        run.left_out = [*left_out(merges, checkpoints, sliced=sliced)]
    announce(run)
    if method == KARCHER:
        warn_of_a_base_that_takes_part(merges)
    tasks_of = OurTasks(run, MetricFiles(options.transformers_cache), checkpoints)
    saved = saved_dtypes(tasks)
    mean = tasks_of.model_mean(merges) if method == KARCHER and _is_whole(merges) else None
    new = {
        id(merge): tasks_of.make(
            MergeTensor, merge, with_metrics=mean is None, mean=mean, saved_as=saved[id(merge)]
        )
        for merge in merges
    }
    rewritten = with_merges_replaced(tasks, new)
    if folder is not None:
        make_folder(folder)
        planned = planned_of(config, merges, checkpoints.counted_once(merges), config.merge_method)
        rewritten.append(report_task(rewritten, planned, run, folder))
    return rewritten


def checked_run(
    merges: Sequence[Any], config: Any, title: str, method: str, *, watched: bool
) -> MergeRun:
    """The run of the merge tasks of a plan, all of which are checked.

    Arguments:
        merges: The tasks, as mergekit planned them.
        config: The config that they were planned for.
        title: What the merge is called in its summary.
        method: `KARCHER`, or the name of the other method.
        watched: Whether there is to be a report.

    Raises:
        KarcherError: If they cannot be merged.
    """
    names = _input_names(merges)
    in_models = [name for of_inputs in names.values() for name in of_inputs.values()]
    check_filters(settings_in(config), [*names, *in_models])
    run = MergeRun(title, method, watched=watched, names=names)
    check_own_changes(merges)
    for merge in merges:
        if is_in_own_changes(merge) and changes_vocabulary(merge):
            run.note("other vocabularies, merged by the linear mean", merge.output_weight.name)
    warn_of_mixed_metrics(merges)
    if method == KARCHER:
        check_merges(merges, run)
    else:
        for merge in merges:
            check_weights_in(merge, run)
    run.settings = settings_in_effect(merges)
    return run


class OurTasks:
    """Makes the tasks of one plan of ours.

    run: the merge that they are of, which is told of each tensor. metrics: the metrics that its
    config names. checkpoints: what its models hold.
    """

    def __init__(self, run: MergeRun, metrics: MetricFiles, checkpoints: Checkpoints) -> None:
        self._run, self._metrics, self._checkpoints = run, metrics, checkpoints

    def make(self, kind: type[T], merge: Any, *, with_metrics: bool = True, **fields: Any) -> T:
        """A task of ours in the place of a merge task of mergekit's."""
        weighs = with_metrics and has_metric(merge)
        return kind(
            merge=merge,
            metrics=self._metrics.loads(merge) if weighs else None,
            run=self._run,
            is_constant=self._checkpoints.is_constant(merge),
            is_whole_numbers=self._checkpoints.is_whole_numbers(merge),
            rows=self._checkpoints.row_layout(merge),
            is_layer=self._checkpoints.is_layer(merge) and not changes_vocabulary(merge),
            **fields,
        )

    def means_only(self, merges: Sequence[Any]) -> list[Any]:
        """Tasks that take the means of merge tasks and combine nothing: one for each, or one."""
        if _is_whole(merges):
            return [self.model_mean(merges)]
        return [self.make(TensorMean, merge) for merge in merges]

    def model_mean(self, merges: Sequence[Any]) -> ModelMean:
        """The task that takes the mean of whole models."""
        counted = self._checkpoints.counted_once(merges)
        return ModelMean(parts=tuple(self.make(TensorProducts, merge) for merge in counted))


@contextmanager
def planning() -> Iterator[None]:
    """Have an error of mergekit's planner end in a sentence that says whose it is."""
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:
        raise KarcherError(
            f"mergekit could not plan this merge ({type(error).__name__}: {first_line(error)})."
        ) from error


def names_layers(config: Any) -> bool:
    """Whether a config of mergekit-yaml that is not planned yet says which layers it takes."""
    modules = (config.modules or {}).values()
    return bool(config.slices) or any(module.slices for module in modules)


def dequantise(cache: Any, models: Iterable[Any]) -> None:
    """Have mergekit read quantised models as what they stand for.

    cache: mergekit's loaders; changed. models: its keys.

    Raises:
        KarcherError: For a quantisation that is not read here.
    """
    for model in models:
        cache.loaders[model] = dequantising(cache.get(model), str(model))


def dequantise_raw(cache: Any, config: Any, options: Any) -> None:
    """The same for the files of a config of mergekit-pytorch."""
    cache.lazy_unpickle = options.lazy_unpickle
    base = [] if config.base_model is None else [config.base_model]
    dequantise(cache, [*(model.model for model in config.models), *base])


def _is_whole(merges: Sequence[Any]) -> bool:
    return any(dict(merge.parameters.items()).get("granularity") == "model" for merge in merges)


def _input_names(merges: Sequence[Any]) -> dict[str, dict[str, str]]:
    """What each input of each output tensor is called in its model."""
    names = {}
    for merge in merges:
        name = merge.output_weight.name
        of_inputs = {str(model): name for model in merge.model_order}
        of_inputs |= {str(model): weight.name for model, weight in weights_read(merge)}
        names[name] = of_inputs
    return names


def _warn_of_no_report(method: str) -> None:
    if os.environ.get(_REPORT):
        _LOG.warning(
            "%s is set, but only merges by karcher write a report: for %s use mergekit-karcher "
            "report.",
            _REPORT,
            method,
        )


def _report_folder(title: str) -> Path | None:
    """Where the environment asks for a report on the merge of that name."""
    asked = os.environ.get(_REPORT)
    if not asked:
        return None
    context = click.get_current_context(silent=True)
    # Several merges in one command: mergekit's, whose name has changed before, or ours.
    stages = context is not None and context.params.get("intermediate_dir") is not None
    return Path(asked) / title if stages else Path(asked)
