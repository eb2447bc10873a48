"""Fine-tunes of SmolLM2-135M-Instruct of low rank (LoRA), merged into the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import smollm
import torch
from cache import cached
from problem import State
from torch import nn
from transformers import PreTrainedModel

RANK = 8
# What the product of the factors is multiplied with, alpha / rank.
_SCALE = 2.0
# Factors are trained at a higher rate than weights.
SIZES = smollm.Sizes(learning_rate=1e-3)


def fine_tune(
    cache: Path,
    model: PreTrainedModel,
    base: State,
    stream: torch.Tensor,
    kind: str,
    seed: int,
    sizes: smollm.Sizes,
) -> State:
    """The base plus the product of two factors in every linear layer of its blocks."""
    settings = asdict(sizes) | {"seed": seed, "context": smollm.CONTEXT, "rank": RANK}
    make = partial(_train, model, base, stream, kind, seed, sizes)
    factors = cached(cache, f"lora-{kind}", settings, make)
    merged = dict(base)
    for name in base:
        if f"{name}.up" in factors:
            merged[name] = base[name] + _SCALE * factors[f"{name}.up"] @ factors[f"{name}.down"]
    return merged


# Half as long as in float32; the factors and the optimizer stay in that.
@torch.autocast("cpu", torch.bfloat16)
def _train(
    model: PreTrainedModel,
    base: State,
    stream: torch.Tensor,
    kind: str,
    seed: int,
    sizes: smollm.Sizes,
) -> State:
    smollm.load_state(model, base)
    model.requires_grad_(False)
    torch.manual_seed(seed)
    factors, handles = {}, []
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            up = nn.Parameter(torch.zeros(module.out_features, RANK))
            down = nn.Parameter(torch.randn(RANK, module.in_features) / module.in_features**0.5)
            factors[f"model.{name}.weight.up"], factors[f"model.{name}.weight.down"] = up, down
            handles.append(module.register_forward_hook(_adds(up, down)))
    smollm.fit(model, [*factors.values()], stream, f"LoRA {kind} {seed}", seed, sizes)
    for handle in handles:
        handle.remove()
    model.requires_grad_(True)
    return {name: factor.detach() for name, factor in factors.items()}


def _adds(up: nn.Parameter, down: nn.Parameter) -> Callable[..., torch.Tensor]:
    def hook(
        module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        return output + _SCALE * (inputs[0] @ down.T) @ up.T

    return hook
