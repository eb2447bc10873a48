"""The merge method that mergekit sees: parameters, contract, and what goes into the summary."""

from __future__ import annotations

from typing import Annotated, Any

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.merge import MAX_ITER, TOL, check_stopping, merge
from mergekit_karcher.summary import label, record

# The second is a name that only we have: a config that uses it never falls back to the built-in.
NAMES = ("karcher", "karcher_mean")

# The one that mergekit gives for its own.
REFERENCE_URL = "https://arxiv.org/abs/2603.04972"


def build_method(name: str) -> Any:
    """A `KarcherMerge` that mergekit knows by that name.

    mergekit's classes are looked up here, and not at the top of this module, because mergekit may
    be in the middle of its own import.
    """
    import torch
    from mergekit.merge_methods.base import (
        GroupMergeMethod,
        MergeMethodSpec,
        ParameterScope,
        ParameterSpec,
        PerInputValues,
        TensorGroup,
    )
    from pydantic import ValidationError, WrapValidator

    def parsed(parameter: str, kind: str) -> WrapValidator:
        def validate(value: Any, parse: Any) -> Any:
            try:
                result = parse(value)
            except ValidationError:
                raise KarcherError(f"{parameter} is {value!r}: give {kind}.") from None
            if parameter == "max_iter":
                check_stopping(result, TOL)
            elif parameter == "tol":
                check_stopping(MAX_ITER, result)
            return result

        return WrapValidator(validate)

    class KarcherMerge(GroupMergeMethod):  # type: ignore[misc]
        """The exact weighted Karcher mean of each tensor; see `mergekit_karcher.karcher_mean`."""

        spec = MergeMethodSpec(
            name=name,
            pretty_name=f"Karcher Mean (mergekit-karcher {__version__})",
            reference_url=REFERENCE_URL,
            parameters=(
                ParameterSpec(
                    "weight",
                    Annotated[float, parsed("weight", "a number of 0 or more")],
                    ParameterScope.INPUT,
                    1.0,
                ),
                ParameterSpec(
                    "max_iter",
                    Annotated[int, parsed("max_iter", "a whole number of 1 or more")],
                    ParameterScope.SHARED,
                    MAX_ITER,
                ),
                ParameterSpec(
                    "tol",
                    Annotated[float, parsed("tol", "a positive number of radians")],
                    ParameterScope.SHARED,
                    TOL,
                ),
            ),
        )

        def merge_group(
            self, group: TensorGroup, /, *, weight: PerInputValues, max_iter: int, tol: float
        ) -> torch.Tensor:
            tensor_name = group.metadata.name or "the tensor"
            merged, mean = merge(
                group.tensors,
                weight.values_for(group.entries),
                max_iter=max_iter,
                tol=tol,
                labels=[label(tensor_name, str(entry.id)) for entry in group.entries],
                name=tensor_name,
            )
            record(tensor_name, mean)
            return merged

    return KarcherMerge()
