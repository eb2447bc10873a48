"""Variants of `metric: self` that were tried: ridges that grow, a quarter of the directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from by_layer import merged_by_layer
from problem import State

from mergekit_karcher import InputGram, fisher_mean
from mergekit_karcher.kernels.overlap import input_products

_RIDGE = 0.3
# Each of the others would be divided by zero, or by next to nothing.
_MOST, _LEAST = 0.97, 1e-3


class Inputs(NamedTuple):
    """How models changed the treatment of a layer's inputs.

    overlap: the mean cosine between their metrics. asked: the parts of all directions of the input
    that each of them changed, summed over models.
    """

    overlap: float
    asked: float


GROWING: dict[str, Callable[[Inputs], float]] = {
    "0.3 / (1 - overlap)": lambda inputs: _RIDGE / (1 - inputs.overlap),
    "0.1 + overlap": lambda inputs: 0.1 + inputs.overlap,
    "overlap / (1 - overlap)": lambda inputs: max(inputs.overlap / (1 - inputs.overlap), _LEAST),
    "0.3 / (1 - directions asked for)": lambda inputs: _RIDGE / (1 - inputs.asked),
}


def _inputs(base: torch.Tensor, experts: Sequence[torch.Tensor]) -> Inputs:
    products = input_products(experts, base, seed=0)
    lengths = np.sqrt(products.diagonal())
    cosines = (products / lengths / lengths[:, None])[np.tril_indices(len(experts), -1)]
    asked = float((1 / products.diagonal()).sum())
    return Inputs(min(float(cosines.mean()), _MOST), min(asked, _MOST))


def _in_own_metrics(
    ridge: Callable[[Inputs], float],
    name: str,
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
) -> torch.Tensor:
    chosen = ridge(_inputs(base, experts))
    return fisher_mean(experts, "self", base=base, ridge=chosen, name=name)


def _best_quarter(name: str, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The metrics of the best quarter of each change's singular directions alone.

    They are found by random rows and one power iteration (Halko et al. 2011, algorithm 4.4).
    """
    generator = torch.Generator().manual_seed(0)
    metrics = []
    for expert in experts:
        change = expert.double() - base.double()
        rank = max(1, min(change.shape) // 4)
        random = torch.randn(change.shape[1], rank, dtype=change.dtype, generator=generator)
        left = torch.linalg.qr(change @ random)[0]
        left = torch.linalg.qr(change @ torch.linalg.qr(change.T @ left)[0])[0]
        metrics.append(InputGram(factor=(left.T @ change) / change.norm()))
    return fisher_mean(experts, metrics, ridge=_RIDGE, name=name)


CONTESTANTS: dict[str, Callable[[State | None, Sequence[State]], State]] = {
    **{
        f"self, ridge {formula}": partial(merged_by_layer, partial(_in_own_metrics, ridge))
        for formula, ridge in GROWING.items()
    },
    f"self, ridge {_RIDGE}, best quarter": partial(merged_by_layer, _best_quarter),
}
