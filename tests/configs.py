"""Configs of mergekit as dictionaries."""

from __future__ import annotations

# What stands under `parameters` of the whole config; everything else is a field of its own.
_PARAMETERS = ("granularity", "origin", "magnitude", "floor", "max_iter", "tol")


def config_for(models, weights=None, base=None, *, metrics=None, **settings):
    """A config that merges models by karcher in float32.

    weights, metrics: one for each model, None to say nothing of it; settings: parameters of the
    whole merge, and fields of the config.
    """
    parameters = {name: settings.pop(name) for name in _PARAMETERS if name in settings}
    config = {
        "merge_method": "karcher",
        "models": [
            {"model": model, "parameters": _given(weight=weight, metric=metric)}
            for model, weight, metric in zip(
                models,
                weights or [None] * len(models),
                metrics or [None] * len(models),
                strict=True,
            )
        ],
        "parameters": parameters,
        "dtype": "float32",
    }
    return config | _given(base_model=base) | settings


def _given(**values):
    return {name: value for name, value in values.items() if value is not None}
