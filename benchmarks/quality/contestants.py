"""Who is compared: merges of float32 state dictionaries, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from by_layer import CONTESTANTS as BY_LAYER
from mergekit.merge_methods import merge_state_dicts
from mergekit.merge_methods.karcher import karcher_merge_tensors
from problem import State
from variants import CONTESTANTS as VARIANTS

Merge = Callable[[State | None, Sequence[State]], State]

LINEAR, BASE, OWN = "linear", "base", "own expert"
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
TASK_ARITHMETIC = "task arithmetic"
_OURS = "karcher"


def _without_base(
    method: str, parameters: Mapping[str, Any], base: State | None, experts: Sequence[State]
) -> State:
    return merge_state_dicts(experts, method, parameters=parameters)


def _with_base(
    method: str, parameters: Mapping[str, Any], base: State | None, experts: Sequence[State]
) -> State:
    if base is None:
        raise ValueError(f"{method} with {parameters} needs the base of the experts")
    # multislerp has no direction for what no expert changed, such as all that LoRA leaves alone.
    changed = [n for n in base if not all(torch.equal(base[n], one[n]) for one in experts)]
    parts = [{name: state[name] for name in changed} for state in (base, *experts)]
    return base | merge_state_dicts(parts, method, parameters=parameters, base=0)


def _builtin(base: State | None, experts: Sequence[State]) -> State:
    shares = [1 / len(experts)] * len(experts)
    # By its function: the name belongs to the plugin where that is installed.
    return {
        name: karcher_merge_tensors([expert[name] for expert in experts], shares)
        for name in experts[0]
    }


def _rescaled_rows(base: State | None, experts: Sequence[State]) -> State:
    """What rows around the base give without the sphere: the mean of unit rows as direction.

    As long as the linear mean, like karcher row, base, linear length. Tells what of that merge is
    due to the exact mean, and what to weighing rows alike.
    """
    if base is None:
        raise ValueError("rows around the base need the base of the experts")
    merged = {}
    for name, origin in base.items():
        differences = torch.stack([expert[name] - origin for expert in experts]).double()
        rows = differences if origin.ndim > 1 else differences[:, None]
        rows = rows.flatten(2)
        direction = torch.nn.functional.normalize(rows, dim=-1).mean(0)
        mean = torch.nn.functional.normalize(direction, dim=-1) * rows.mean(0).norm(
            dim=-1, keepdim=True
        )
        merged[name] = (origin + mean.reshape(origin.shape)).to(origin.dtype)
    return merged


def _ours(granularity: str, origin: str, magnitude: str) -> dict[str, Merge]:
    name = f"{_OURS} {granularity}, {origin}"
    if magnitude != "arithmetic":
        name += f", {magnitude} length"
    parameters = {"granularity": granularity, "origin": origin, "magnitude": magnitude}
    return {name: partial(_with_base if origin == "base" else _without_base, _OURS, parameters)}


_AROUND_ZERO: dict[str, Merge] = {
    LINEAR: partial(_without_base, "linear", {"weight": 1.0}),
    "built-in karcher": _builtin,
    **_ours("tensor", "zero", "arithmetic"),
    **_ours("row", "zero", "arithmetic"),
    **_ours("model", "zero", "arithmetic"),
}

WITH_BASE: dict[str, Merge] = {
    **_AROUND_ZERO,
    **{
        f"{TASK_ARITHMETIC} {value}": partial(
            _with_base, "task_arithmetic", {"weight": 1.0, "normalize": False, "lambda": value}
        )
        for value in LAMBDAS
    },
    "multislerp": partial(_with_base, "multislerp", {"weight": 1.0}),
    **_ours("tensor", "base", "arithmetic"),
    **_ours("row", "base", "arithmetic"),
    **_ours("model", "base", "arithmetic"),
    **_ours("tensor", "base", "linear"),
    **_ours("row", "base", "linear"),
    **_ours("model", "base", "linear"),
    "unit rows, base, linear length": _rescaled_rows,
    **BY_LAYER,
    **VARIANTS,
}

WITHOUT_BASE: dict[str, Merge] = {
    **_AROUND_ZERO,
    **_ours("tensor", "zero", "linear"),
    **_ours("tensor", "zero", "geometric"),
}
