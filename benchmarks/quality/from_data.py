"""Merges in metrics from a little of the data that each expert was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import tied
import torch
from by_layer import merged_by_layer
from problem import Expert, Problem, State
from torch import nn

from mergekit_karcher import InputGram, fisher_mean
from mergekit_karcher.metrics.diagonal import Batch, DiagonalFisher

T = TypeVar("T")

WINDOWS = (4, 16, 64)
# Enough for columns that no input ever reached, such as the corners of images, to be solved.
_LEAST_RIDGE = 1e-4


class Regularised(NamedTuple):
    """Input Grams from some windows of each expert, off-diagonal entries times shrinkage."""

    windows: int
    shrinkage: float
    ridge: float


GRAMS = {
    f"input Grams, {count} windows, {name}": Regularised(count, shrinkage, ridge)
    for count in WINDOWS
    for name, shrinkage, ridge in (
        ("ridge 0.1", 1.0, 0.1),
        ("alpha 0.9", 0.9, _LEAST_RIDGE),
        ("alpha 0.99", 0.99, _LEAST_RIDGE),
    )
}
_TIED_TO = "input Grams, 16 windows, ridge 0.1"
TIED = {f"{_TIED_TO}, embedding by {name}": merge for name, merge in tied.MERGES.items()}
FISHER = f"diagonal Fisher, {WINDOWS[-1]} windows"
FROM_DATA = (*GRAMS, *TIED, FISHER)


def windows_of(stream: torch.Tensor, length: int, count: int, seed: int) -> torch.Tensor:
    """The first of the random windows of a text that are drawn with a seed, (count, length)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    starts = torch.randint(len(stream) - length, (WINDOWS[-1],), generator=generator)
    return torch.stack([stream[start : start + length] for start in starts[:count].tolist()])


def windows_of_own(
    streams: Mapping[str, torch.Tensor], length: int, seed: int, own: Expert, count: int
) -> torch.Tensor:
    """Windows of the text that an expert was trained on."""
    return windows_of(streams[own.task], length, count, seed)


@torch.inference_mode()
def input_grams(network: nn.Module, look: Callable[[], object]) -> State:
    """E[x x'] of the inputs of every linear layer over what look() passes through it, by weight."""
    sums: State = {}
    counts: dict[str, int] = {}

    def hook(weight: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
            rows = inputs[0].flatten(0, -2)
            sums[weight] = sums.get(weight, 0) + rows.T @ rows
            counts[weight] = counts.get(weight, 0) + len(rows)

        return add

    handles = [
        module.register_forward_hook(hook(f"{name}.weight"))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    look()
    for handle in handles:
        handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def diagonal_fisher(network: nn.Module, batches: Iterable[Batch]) -> State:
    """The diagonal Fisher information of a network's weights, on its own data."""
    found = DiagonalFisher(network.eval())
    for batch in batches:
        found.add(batch)
    return found.metric()


def merges(problem: Problem, wanted: Sequence[str] | None) -> Iterator[tuple[str, State]]:
    """The merges of a problem that has its data, or the wanted of them, by name."""
    if problem.base is None or problem.data is None:
        return
    states = [expert.state for expert in problem.experts]
    for count in WINDOWS:
        some = {name: how for name, how in GRAMS.items() if how.windows == count}
        chosen = _wanted(some, wanted)
        heads = _wanted(TIED, wanted) if count == GRAMS[_TIED_TO].windows else {}
        if not chosen and not heads:
            continue
        grams = [problem.data.grams(expert, count) for expert in problem.experts]
        for name, how in chosen.items():
            yield name, _in_grams(problem.base, states, grams, how)
        if heads and problem.data.tokens and tied.is_tied(problem.base, grams[0]):
            seen = [problem.data.tokens(expert, count) for expert in problem.experts]
            body = _in_grams(problem.base, states, grams, GRAMS[_TIED_TO])
            for name, merge in heads.items():
                yield name, body | tied.embedding(states, grams, seen, merge)
    if problem.data.fisher is not None and (wanted is None or FISHER in wanted):
        metrics = [problem.data.fisher(expert, WINDOWS[-1]) for expert in problem.experts]
        yield FISHER, _in_diagonals(states, metrics)


def _wanted(contestants: Mapping[str, T], wanted: Sequence[str] | None) -> dict[str, T]:
    return {n: how for n, how in contestants.items() if wanted is None or n in wanted}


def _in_grams(
    base: State, states: Sequence[State], grams: Sequence[State], how: Regularised
) -> State:
    def merge(name: str, origin: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        own = [InputGram(dense=_shrunk(gram[name], how.shrinkage)) for gram in grams]
        return fisher_mean(tensors, own, ridge=how.ridge)

    return merged_by_layer(merge, base, states)


def _shrunk(gram: torch.Tensor, shrinkage: float) -> torch.Tensor:
    diagonal = torch.diag(gram.diagonal())
    return shrinkage * gram + (1 - shrinkage) * diagonal


def _in_diagonals(states: Sequence[State], metrics: Sequence[State]) -> State:
    return {
        name: fisher_mean([s[name] for s in states], [metric[name] for metric in metrics])
        for name in states[0]
    }
