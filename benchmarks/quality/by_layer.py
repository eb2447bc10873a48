"""Merges of fine-tunes that treat weights as matrices, and those that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from mergekit.merge_methods import merge_state_dicts
from problem import State

from mergekit_karcher import fisher_mean
from mergekit_karcher.host.rows import is_layer

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)

# Of a layer's name, its base and its fine-tunes.
MergeLayer = Callable[[str, torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]


def merged_by_layer(merge: MergeLayer, base: State | None, experts: Sequence[State]) -> State:
    """Linear layers merged by a function of their own, all else by the linear mean."""
    if base is None:
        raise ValueError("this merge needs the base of the experts")
    merged = {}
    for name, origin in base.items():
        tensors = [expert[name] for expert in experts]
        if is_layer(name, origin.shape):
            merged[name] = merge(name, origin, tensors).to(origin.dtype)
        else:
            merged[name] = torch.stack(tensors).mean(0)
    return merged


def _in_own_metrics(
    ridge: float, name: str, base: torch.Tensor, experts: Sequence[torch.Tensor]
) -> torch.Tensor:
    return fisher_mean(experts, "self", base=base, ridge=ridge, name=name)


def _isotropic(name: str, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Iso-C (Marczak et al. 2025, algorithm 1): all singular values their mean; scale 1."""
    total = sum(expert.double() - base.double() for expert in experts)
    left, values, right = torch.linalg.svd(torch.as_tensor(total), full_matrices=False)
    return base.double() + values.mean() * left @ right


def _singular_vectors(
    name: str, base: torch.Tensor, experts: Sequence[torch.Tensor]
) -> torch.Tensor:
    """TSV-M (Gargiulo et al. 2025, algorithm 1): the top 1/N of each, made orthogonal; scale 1."""
    lefts, values, rights = [], [], []
    for expert in experts:
        left, value, right = torch.linalg.svd(expert.double() - base.double(), full_matrices=False)
        count = max(1, len(value) // len(experts))
        lefts.append(left[:, :count])
        values.append(value[:count])
        rights.append(right[:count])
    left, right = _nearest_orthogonal(torch.cat(lefts, 1)), _nearest_orthogonal(torch.cat(rights))
    return base.double() + (left * torch.cat(values)) @ right


def _nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _of_mergekit(
    method: str, normalize: bool, base: State | None, experts: Sequence[State]
) -> State:
    """At a density of 0.2, that of TIES' authors; DARE's mask is seeded.

    normalize: whether each entry is a mean of the models that agree on its sign, or their sum;
    mergekit's default is the mean for TIES and the sum for DARE.
    """
    if base is None:
        raise ValueError(f"{method} needs the base of the experts")
    torch.manual_seed(0)
    parameters = {"weight": 1.0, "density": 0.2, "normalize": normalize}
    return merge_state_dicts([base, *experts], method, parameters=parameters, base=0)


CONTESTANTS: dict[str, Callable[[State | None, Sequence[State]], State]] = {
    **{f"self, ridge {r}": partial(merged_by_layer, partial(_in_own_metrics, r)) for r in RIDGES},
    "Iso-C": partial(merged_by_layer, _isotropic),
    "TSV-M": partial(merged_by_layer, _singular_vectors),
    "ties": partial(_of_mergekit, "ties", True),
    "dare_ties": partial(_of_mergekit, "dare_ties", False),
    "dare_ties, normalize": partial(_of_mergekit, "dare_ties", True),
}
