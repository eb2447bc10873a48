"""Time of one weight, and of a layer's worth of small ones, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from contestants import BUILTIN, CONTESTANTS, DTYPES, LINEAR, OURS, Merge, angle, random_group
from rows import Row, Seconds, interleave, timed_rows

from mergekit_karcher import Status, karcher_mean

# 64 tensors: a small model's matrices, norms and biases.
SMALL = [(256, 256)] * 8 + [(128, 64)] * 8 + [(1024,)] * 16 + [(256,)] * 24 + [(1,)] * 8

Groups = Sequence[Sequence[torch.Tensor]]


class Sizes(NamedTuple):
    """How much to measure."""

    side: int = 4096
    models: tuple[int, ...] = (2, 3, 5, 10, 17)
    independent_models: tuple[int, ...] = (3, 10)
    rounds: int = 7
    builtin_rounds: int = 3


QUICK = Sizes(256, (2,), (3,), 2, 1)


def kernels(sizes: Sizes) -> Iterator[Row]:
    """Every contestant with its defaults."""
    rounds = {OURS: sizes.rounds, LINEAR: sizes.rounds, BUILTIN: sizes.builtin_rounds}
    weight = f"{sizes.side} x {sizes.side}", [(sizes.side, sizes.side)]
    small = f"{len(SMALL)} small", SMALL
    for kind, (title, shapes), counts in (
        ("fine-tunes", weight, sizes.models),
        ("independent", weight, sizes.independent_models),
        ("fine-tunes", small, sizes.models),
    ):
        for dtype in ("bf16", "fp32"):
            for count in counts:
                groups = [
                    random_group(kind, count, shape, DTYPES[dtype], seed)
                    for seed, shape in enumerate(shapes)
                ]
                seconds, outputs = compete(CONTESTANTS, groups, rounds)
                more = {
                    name: {"rad_from_ours": angle(out, outputs[OURS])}
                    for name, out in outputs.items()
                }
                case = {"inputs": kind, "tensors": title, "dtype": dtype, "models": count}
                yield from timed_rows("kernels", case, seconds, more | {OURS: facts(groups)})


def compete(
    contestants: Mapping[str, Merge], groups: Groups, rounds: Mapping[str, int]
) -> tuple[Seconds, dict[str, torch.Tensor]]:
    """Seconds for all groups by contestant and round, and what each made of the first group."""
    outputs: dict[str, torch.Tensor] = {}
    for merge in contestants.values():
        merge(random_group("fine-tunes", 2, (64, 64), groups[0][0].dtype))
    calls = {name: _timer(name, merge, groups, outputs) for name, merge in contestants.items()}
    return interleave(calls, rounds), outputs


def _timer(
    name: str, merge: Merge, groups: Groups, outputs: dict[str, torch.Tensor]
) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        merged = [merge(group) for group in groups]
        seconds = time.perf_counter() - start
        outputs[name] = merged[0]
        return seconds

    return run


def facts(groups: Groups) -> dict[str, Any]:
    """What our method says of its own result."""
    means = [karcher_mean(group)[1] for group in groups]
    found = [mean for mean in means if mean.status is Status.CONVERGED]
    return {
        "converged": f"{len(found)} of {len(means)}",
        "largest_residual_rad": max((mean.residual for mean in found), default=None),
        "most_steps": max(mean.iterations for mean in means),
        "largest_angle_rad": max((float(mean.angles.max()) for mean in found), default=None),
    }
