"""Where NaN and infinity are refused: in the inputs, and in results that a dtype cannot hold."""

from __future__ import annotations

import math
from typing import NoReturn

import torch

from mergekit_karcher.errors import KarcherError, NotFiniteError
from mergekit_karcher.kernels.sums import sum_and_least
from mergekit_karcher.means.inputs import Inputs

# A length that was rounded may be a little too small.
_SLACK = 1 + 1e-6


def refuse_not_finite(inputs: Inputs, place: int) -> NoReturn:
    """Raise `KarcherError` with the value that made the inner products of an input not finite.

    place: which input; N stands for the base. With a base, it or the difference may be at fault.
    """
    suspects = [*zip(inputs.tensors, inputs.labels, strict=True)][place : place + 1]
    if inputs.base is not None:
        suspects.append((inputs.base, "base"))
    for tensor, label in suspects:
        _check_finite(tensor, label, inputs.name)
    raise KarcherError(
        f"The difference of {inputs.name} of {suspects[0][1]} from the base is not finite: "
        "repair or leave out that model, or give it a weight of 0."
    )


def check_result(
    result: torch.Tensor, inputs: Inputs, dtype: torch.dtype, length: float | None = None
) -> None:
    """Raise `KarcherError` unless the mean of inputs is finite in the dtype that it is saved in.

    length: |result - base|, Euclidean; the result is read only where that is large or not known.
    """
    largest = torch.finfo(dtype).max
    # The base holds numbers of that dtype: less than half a unit more is rounded away.
    room = largest if inputs.base is None else largest * torch.finfo(dtype).eps / 4
    narrowed = inputs.base is not None and largest < torch.finfo(result.dtype).max
    if length is not None and length * _SLACK <= room and not narrowed:
        return
    saved = result.to(dtype)
    if math.isfinite(sum_and_least(saved)[0]) or bool(torch.isfinite(saved).all()):
        return
    for tensor, label in zip(inputs.tensors, inputs.labels, strict=True):
        _check_finite(tensor, label, inputs.name)
    place = torch.nonzero(~torch.isfinite(saved))[0].tolist()
    short = str(dtype).removeprefix("torch.")
    raise KarcherError(
        f"The mean of {inputs.name} is beyond {largest:.6g} at {place}, the largest number that "
        f"{short} holds: take out_dtype: bfloat16 (with dtype: float32), or magnitude: linear, "
        "which is never longer than the inputs."
    )


def _check_finite(tensor: torch.Tensor, label: str, name: str) -> None:
    bad = torch.nonzero(~torch.isfinite(tensor))
    if len(bad):
        place = bad[0].tolist()
        raise NotFiniteError(
            f"{name} of {label} is not finite in {len(bad)} of {tensor.numel()} places, first "
            f"{tensor[tuple(place)]} at {place}: repair or leave out that model, or give it a "
            "weight of 0."
        )
