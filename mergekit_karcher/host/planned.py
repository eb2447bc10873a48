"""What the plan of a merge says about the report on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit_karcher.host.graph import only_tied
from mergekit_karcher.host.metric_tasks import has_metric
from mergekit_karcher.report.build import Planned
from mergekit_karcher.report.names import is_local, short_names
from mergekit_karcher.report.observation import ROUNDOFF
from mergekit_karcher.report.schema import Model, Settings


def planned_of(config: Any, merges: Sequence[Any], asked_for: str) -> Planned:
    """From a config, its merge tasks, and the merge method that its author asked for."""
    from mergekit.common import dtype_from_name

    if not hasattr(config, "slices"):
        # mergekit-pytorch plans its tensors in the order of a set.
        merges = sorted(merges, key=lambda task: str(task.output_weight.name))
    paths = list(dict.fromkeys(str(model) for task in merges for model in task.model_order))
    bases = dict.fromkeys(str(task.base_model) for task in merges if task.base_model is not None)
    base = next((path for path in bases if path in paths), None)
    names = short_names(paths, is_local)
    models = {
        path: Model(
            name=names[path],
            hub_ids=[part.split("@")[0] for part in path.split("+") if not is_local(part)],
            is_base=path == base,
        )
        for path in paths
    }

    def used(parameter: str) -> list[str]:
        return list(dict.fromkeys(str(task.parameters[parameter]) for task in merges))

    settings = Settings(
        merge_method=asked_for,
        as_karcher=asked_for != config.merge_method,
        granularity=used("granularity"),
        origin=used("origin"),
        magnitude=used("magnitude"),
        dtype=config.dtype,
        out_dtype=config.out_dtype,
        in_metric=any(has_metric(task) for task in merges),
    )
    output = dtype_from_name(config.out_dtype or config.dtype)
    return Planned(
        settings,
        models,
        base,
        {
            task.output_weight.name: task.parameters["granularity"]
            for task in merges
            if not only_tied(task)
        },
        None if output is None else ROUNDOFF[output],
    )
