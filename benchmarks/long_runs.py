"""A published configuration: 17 bf16 models, tol 1e-10, max_iter 999.

Both run whole on a small weight. On a large one, where the built-in would take hours, its time is
extrapolated from the difference between two short runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from contestants import BUILTIN, OURS, Merge, Tensors, angle, builtin, ours, random_group
from kernels import compete, facts
from rows import Row, quantiles, timed_rows
from torch.overrides import TorchFunctionMode

ITERATIONS, TOL = 999, 1e-10
SHORT, LONGER = 5, 15

_OURS = partial(ours, max_iter=ITERATIONS, tol=TOL)


def long_runs(side: int, whole_side: int, models: int, rounds: int) -> Iterator[Row]:
    """Whole runs on whole_side x whole_side, extrapolated ones on side x side.

    Raises RuntimeError where noise hides what an iteration takes.
    """
    yield from _whole(whole_side, models, rounds)
    yield from _extrapolated(side, models, rounds)


def _whole(side: int, models: int, rounds: int) -> Iterator[Row]:
    group = random_group("fine-tunes", models, (side, side), torch.bfloat16)
    contestants: dict[str, Merge] = {OURS: _OURS, BUILTIN: _builtin(ITERATIONS)}
    seconds, outputs = compete(contestants, [group], dict.fromkeys(contestants, rounds))
    about_builtin = {
        "rad_from_ours": angle(outputs[BUILTIN], outputs[OURS]),
        "iterations": _iterations(contestants[BUILTIN], group),
    }
    case = _case(side, models, "measured")
    yield from timed_rows("long", case, seconds, {OURS: facts([group]), BUILTIN: about_builtin})


def _extrapolated(side: int, models: int, rounds: int) -> Iterator[Row]:
    group = random_group("fine-tunes", models, (side, side), torch.bfloat16)
    contestants: dict[str, Merge] = {
        OURS: _OURS,
        "short": _builtin(SHORT),
        "longer": _builtin(LONGER),
    }
    seconds, _ = compete(contestants, [group], dict.fromkeys(contestants, rounds))
    short, longer = seconds["short"], seconds["longer"]
    differences = {turn: (longer[turn] - short[turn]) / (LONGER - SHORT) for turn in short}
    step = {turn: seconds for turn, seconds in differences.items() if seconds > 0}
    if not step:
        raise RuntimeError(f"{LONGER} iterations took no longer than {SHORT}: too busy a machine")
    whole = {turn: short[turn] + (ITERATIONS - SHORT) * step[turn] for turn in step}
    about_builtin = {
        "measured_iterations": [SHORT, LONGER],
        "rounds_too_noisy": len(short) - len(step),
        "seconds_per_iteration": quantiles(list(step.values())),
        "iterations": ITERATIONS,
    }
    yield from timed_rows(
        "long",
        _case(side, models, "EXTRAPOLATED"),
        {OURS: seconds[OURS], BUILTIN: whole},
        {OURS: facts([group]), BUILTIN: about_builtin},
    )


def _builtin(max_iter: int) -> Merge:
    return partial(builtin, max_iter=max_iter, tol=TOL)


def _case(side: int, models: int, how: str) -> dict[str, Any]:
    return {
        "tensors": f"{side} x {side}",
        "models": models,
        "max_iter": ITERATIONS,
        "tol": TOL,
        "built-in's time": how,
    }


class _CountCosines(TorchFunctionMode):
    """The built-in takes one cosine in each iteration that moves."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.cos
        return func(*args, **(kwargs or {}))


def _iterations(merge: Merge, group: Tensors) -> int:
    with _CountCosines() as counter:
        merge(group)
    return counter.count
