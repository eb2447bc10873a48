"""Parameters of merge methods, as mergekit reads them, with our words for a wrong value."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any, Literal

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.means.metric import FLOOR, check_floor


def parameter(
    name: str,
    kind: Any,
    words: str,
    default: Any,
    *,
    of_a_model: bool = False,
    check: Callable[[Any], None] | None = None,
) -> Any:
    """A `ParameterSpec` of mergekit, of the whole merge unless it is of a model.

    kind: its type. words: what to give instead of a value that is not of it. check: raises for
    values that are.
    """
    from mergekit.merge_methods.base import ParameterScope, ParameterSpec
    from pydantic import ValidationError, WrapValidator

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

    scope = ParameterScope.INPUT if of_a_model else ParameterScope.SHARED
    return ParameterSpec(name, Annotated[kind, WrapValidator(validate)], scope, default)


def weight_parameter() -> Any:
    """How much a model counts."""
    return parameter("weight", float, "a number of 0 or more", 1.0, of_a_model=True)


def metric_parameter() -> Any:
    """Where a model's metric is; empty for none."""
    return parameter("metric", str, "a folder, a file, a Hub id, or identity", "", of_a_model=True)


def origin_parameter() -> Any:
    """What the models are seen from."""
    return parameter("origin", Literal["zero", "base"], "zero or base", "zero")


def floor_parameter() -> Any:
    """What is added to each metric, as a fraction of its mean."""
    words = "a fraction of 0 or more, such as 1e-6"
    return parameter("floor", float, words, FLOOR, check=check_floor)
