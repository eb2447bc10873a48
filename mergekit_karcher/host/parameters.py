"""The parameters of our merge methods: what each accepts, and our words for a wrong value.

Imported once mergekit's own classes are there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from pydantic import ValidationError, WrapValidator

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.means.matrix_mean import RIDGE, check_ridge
from mergekit_karcher.means.metric import FLOOR, check_floor
from mergekit_karcher.means.solve import MAX_ITER, TOL, Settings, check_stopping
from mergekit_karcher.sphere.magnitude import Magnitude


def _parameter(
    name: str,
    kind: Any,
    words: str,
    default: Any,
    *,
    scope: ParameterScope = ParameterScope.SHARED,
    check: Callable[[Any], None] | None = None,
) -> ParameterSpec:
    """A parameter; words: what to give instead of a value that is not of that kind."""

    def validate(value: Any, parse: Any) -> Any:
        try:
            result = parse(value)
        except ValidationError:
            hint = ""
            if isinstance(value, str) and os.sep in value:
                hint = " (mergekit-multi puts a path where the value is the name of a stage)"
            raise KarcherError(f"{name} is {value!r}: give {words}{hint}.") from None
        if check is not None:
            check(result)
        return result

    return ParameterSpec(name, Annotated[kind, WrapValidator(validate)], scope, default)


# Of a model: how much it counts, and where its metric is; empty for none.
_WEIGHT = _parameter("weight", float, "a number of 0 or more", 1.0, scope=ParameterScope.INPUT)
_METRIC = _parameter(
    "metric", str, "a folder, a file, a Hub id, identity or self", "", scope=ParameterScope.INPUT
)
_ORIGIN = _parameter("origin", Literal["zero", "base"], "zero or base", "zero")
_FLOOR = _parameter(
    "floor", float, "a fraction of 0 or more, such as 1e-6", FLOOR, check=check_floor
)

_RIDGE = _parameter(
    "ridge", float, "a fraction of 0 or more, such as 0.3", RIDGE, check=check_ridge
)

# Of tensors that every model has and mergekit does not plan.
_LEFT_OUT = _parameter("left_out", Literal["stop", "drop"], "stop or drop", "stop")

FISHER_PARAMETERS = (_WEIGHT, _METRIC, _ORIGIN, _FLOOR, _RIDGE, _LEFT_OUT)

KARCHER_PARAMETERS = (
    _WEIGHT,
    _METRIC,
    _parameter("granularity", Literal["tensor", "row", "model"], "tensor, row or model", "tensor"),
    _ORIGIN,
    _parameter(
        "magnitude",
        Literal["arithmetic", "linear", "geometric"],
        "arithmetic, linear or geometric",
        "arithmetic",
    ),
    _FLOOR,
    _parameter(
        "max_iter",
        int,
        "a whole number of 1 or more",
        MAX_ITER,
        check=lambda value: check_stopping(value, TOL),
    ),
    _parameter(
        "tol",
        float,
        "a positive number of radians",
        TOL,
        check=lambda value: check_stopping(MAX_ITER, value),
    ),
    _LEFT_OUT,
)


def settings_of(parameters: Mapping[str, Any]) -> Settings:
    """Those of karcher's shared parameters that say how to take a mean."""
    return Settings(
        parameters["granularity"],
        Magnitude(parameters["magnitude"]),
        parameters["max_iter"],
        parameters["tol"],
    )
