"""What the plan of a merge says about the report on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit_karcher.host.graph import has_metric, only_tied
from mergekit_karcher.report.build import Planned
from mergekit_karcher.report.names import is_local, short_names
from mergekit_karcher.report.observation import ROUNDOFF
from mergekit_karcher.report.schema import Model, Settings


def planned_of(config: Any, merges: Sequence[Any], asked_for: str) -> Planned:
    """What the report on a merge is told of its plan.

    Arguments:
        config: The config of mergekit-yaml or mergekit-pytorch.
        merges: Its merge tasks, as mergekit planned them.
        asked_for: The merge method that the config asks for; karcher is what it is seen by.

    Returns:
        The settings, the models by name, and the tensors that count.
    """
    from mergekit.common import dtype_from_name

    if not hasattr(config, "slices"):
        # mergekit-pytorch plans its tensors in the order of a set.
        merges = sorted(merges, key=lambda merge: str(merge.output_weight.name))
    models, base = _models(merges)
    output = dtype_from_name(config.out_dtype or config.dtype)
    return Planned(
        _settings(config, merges, asked_for),
        models,
        base,
        {
            merge.output_weight.name: merge.parameters["granularity"]
            for merge in merges
            if not only_tied(merge)
        },
        None if output is None else ROUNDOFF[output],
    )


def _models(merges: Sequence[Any]) -> tuple[dict[str, Model], str | None]:
    """The models of a plan by their paths, and the path of the base among them."""
    paths = list(dict.fromkeys(str(model) for merge in merges for model in merge.model_order))
    bases = dict.fromkeys(str(m.base_model) for m in merges if m.base_model is not None)
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
    return models, base


def _settings(config: Any, merges: Sequence[Any], asked_for: str) -> Settings:
    def used(parameter: str) -> list[str]:
        return list(dict.fromkeys(str(merge.parameters[parameter]) for merge in merges))

    return Settings(
        merge_method=asked_for,
        as_karcher=asked_for != config.merge_method,
        granularity=used("granularity"),
        origin=used("origin"),
        magnitude=used("magnitude"),
        dtype=config.dtype,
        out_dtype=config.out_dtype,
        in_metric=any(has_metric(merge) for merge in merges),
    )
