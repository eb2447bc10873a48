"""Who is compared, and on what: three functions of a list of tensors, and random tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from mergekit import merge_methods
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.dtype import align_dtype
from mergekit.merge_methods.karcher import karcher_merge_tensors

from mergekit_karcher import karcher_mean

Tensors = Sequence[torch.Tensor]
Merge = Callable[[Tensors], torch.Tensor]

OURS, BUILTIN, LINEAR = "ours", "built-in", "linear"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

# Radians between a fine-tune and its base.
FINE_TUNE_ANGLE = 0.3


def ours(tensors: Tensors, **stopping: float) -> torch.Tensor:
    """This package; stopping: max_iter and tol, if not its defaults."""
    return karcher_mean(tensors, **stopping)[0]


def builtin(tensors: Tensors, max_iter: int = 10, tol: float = 1e-5) -> torch.Tensor:
    """mergekit's own karcher, behind the promotion of mixed dtypes that mergekit does for it."""
    group = align_dtype(TensorGroup.from_tensors(tensors))
    shares = [1 / len(tensors)] * len(tensors)
    return karcher_merge_tensors(group.tensors, shares, max_iter=max_iter, tol=tol)


def linear(tensors: Tensors) -> torch.Tensor:
    """mergekit's linear, with equal weights."""
    group = TensorGroup.from_tensors(tensors)
    (merged,) = merge_methods.get("linear")((group,), parameters={"weight": 1.0})
    return merged


CONTESTANTS: dict[str, Merge] = {OURS: ours, BUILTIN: builtin, LINEAR: linear}


def random_group(
    kind: str, count: int, shape: Sequence[int], dtype: torch.dtype, seed: int = 0
) -> list[torch.Tensor]:
    """As many tensors: 'fine-tunes' of one random base, or 'independent' ones (orthogonal)."""
    generator = torch.Generator().manual_seed(seed)
    spread = math.tan(FINE_TUNE_ANGLE) if kind == "fine-tunes" else 1.0
    base = torch.randn(shape, generator=generator) if kind == "fine-tunes" else torch.zeros(shape)
    noises = (torch.randn(shape, generator=generator) for _ in range(count))
    return [noise.mul_(spread).add_(base).mul_(0.02).to(dtype) for noise in noises]


def angle(left: torch.Tensor, right: torch.Tensor) -> float:
    """Radians between two tensors, in float64."""
    p, q = (side.double() / side.double().norm() for side in (left, right))
    return 2 * math.atan2((p - q).norm(), (p + q).norm())
