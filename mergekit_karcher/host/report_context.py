"""What the plan of a merge says about the report on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from mergekit_karcher.host.checks import weights_of
from mergekit_karcher.host.documents import SELF
from mergekit_karcher.host.graph import has_metric, is_in_own_changes
from mergekit_karcher.host.run import FISHER_NAMES
from mergekit_karcher.report.apart import plain_range
from mergekit_karcher.report.build import Planned
from mergekit_karcher.report.names import is_local, short_names
from mergekit_karcher.report.observation import ROUNDOFF
from mergekit_karcher.report.schema import Model, Settings


def planned_of(
    config: Any, merges: Sequence[Any], counted: Sequence[Any], asked_for: str
) -> Planned:
    """What the report on a merge is told of its plan.

    Arguments:
        config: The config of mergekit-yaml or mergekit-pytorch.
        merges: Its merge tasks, as mergekit planned them.
        counted: Those whose tensors count, each tensor of a checkpoint once.
        asked_for: The merge method that the config asks for; karcher is what it is seen by.

    Returns:
        The settings, the models by name, and the tensors that count.
    """
    from mergekit.common import dtype_from_name

    if not hasattr(config, "slices"):
        # mergekit-pytorch plans its tensors in the order of a set.
        merges = sorted(merges, key=lambda merge: str(merge.output_weight.name))
    once = {id(merge) for merge in counted}
    models, base = _models(merges)
    output = dtype_from_name(config.out_dtype or config.dtype)
    return Planned(
        _settings(config, merges, asked_for),
        models,
        base,
        {
            # fisher weighs every element by itself.
            merge.output_weight.name: next(iter(_used([merge], "granularity")), "element")
            for merge in merges
            if id(merge) in once
        },
        None if output is None else ROUNDOFF[output],
    )


def settings_in_effect(merges: Sequence[Any]) -> list[str]:
    """The weights and settings that the merge tasks of a plan have, as lines for people."""
    models, _ = _models(merges)
    weights = [
        f"{model.name} {plain_range(model.weight_range)}"
        for model in models.values()
        if model.weight_range
    ]
    origin = [f"base: {model.name}" for model in models.values() if not model.weight_range]
    own_changes = any(map(is_in_own_changes, merges))
    settings = [f"metric: {SELF}"] if own_changes else []
    settings += [
        f"{parameter}: {' and '.join(values)}"
        for parameter in (("ridge",) if own_changes else ("granularity", "origin", "magnitude"))
        if (values := _used(merges, parameter))
    ]
    return [f"weights: {'; '.join([', '.join(weights), *origin])}", ", ".join(settings)]


def _models(merges: Sequence[Any]) -> tuple[dict[str, Model], str | None]:
    """The models of a plan by their paths, and the path of the base among them."""
    paths = list(dict.fromkeys(str(model) for merge in merges for model in merge.model_order))
    bases = dict.fromkeys(str(m.base_model) for m in merges if m.base_model is not None)
    base = next((path for path in bases if path in paths), None)
    names, shares = short_names(paths, is_local), _shares(merges)
    models = {
        path: Model(
            name=names[path],
            hub_ids=[part.split("@")[0] for part in path.split("+") if not is_local(part)],
            is_base=path == base,
            weight_range=(min(shares[path]), max(shares[path])) if path in shares else None,
        )
        for path in paths
    }
    return models, base


def _shares(merges: Sequence[Any]) -> dict[str, list[float]]:
    """The weights that each model has in the tensors of a plan; those of a tensor sum to one."""
    shares = defaultdict(list)
    for merge in merges:
        weights = weights_of(merge)
        for model, weight in weights.items():
            shares[str(model)].append(weight / (sum(weights.values()) or 1.0))
    return shares


def _used(merges: Sequence[Any], parameter: str) -> list[str]:
    """The values that a parameter has; none where the method does not know it."""
    known = [merge.parameters for merge in merges if parameter in merge.parameters]
    return list(dict.fromkeys(str(parameters[parameter]) for parameters in known))


def _settings(config: Any, merges: Sequence[Any], asked_for: str) -> Settings:
    return Settings(
        merge_method=asked_for,
        as_karcher=asked_for != config.merge_method,
        granularity=_used(merges, "granularity"),
        origin=_used(merges, "origin"),
        magnitude=_used(merges, "magnitude"),
        dtype=config.dtype,
        out_dtype=config.out_dtype,
        in_metric=asked_for not in FISHER_NAMES and any(has_metric(merge) for merge in merges),
    )
