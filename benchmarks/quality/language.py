"""Tiny Llama experts for three kinds of text, trained as the demo trains them, in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import train as demo
from cache import cached
from problem import Expert, Metrics, Problem, State
from texts import KINDS, load
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Sizes:
    """Width relative to the demo's model, and steps of training."""

    width: int = 1
    base_steps: int = demo.SETTINGS["base"]["steps"]
    expert_steps: int = demo.SETTINGS["expert"]["steps"]


def problems(sizes: Sizes, section: str, seeds: int, cache: Path) -> Iterator[Problem]:
    """One problem a seed; the texts are the same for all."""
    tokenizer = demo.byte_tokenizer()
    texts = {kind: load(kind) for kind in KINDS}
    streams = {k: torch.tensor(tokenizer(text.train).input_ids) for k, text in texts.items()}
    context = demo.SETTINGS["context"]
    windows = {
        kind: torch.tensor(tokenizer(text.held_out).input_ids).unfold(0, context, context)
        for kind, text in texts.items()
    }
    model = _model(sizes)
    for seed in range(seeds):
        # The demo's train() takes the seed of its random windows from here.
        demo.SETTINGS["seed"] = seed
        common = {"seed": seed, "base": demo.SETTINGS["base"]} | asdict(sizes)
        # Experts trained for longer start from the same base.
        base_settings = common | {"expert_steps": None}
        base = cached(
            cache,
            "llama-base",
            base_settings,
            partial(_train_base, seed, sizes, list(streams.values())),
        )
        experts = [
            Expert(
                kind,
                cached(
                    cache,
                    f"llama-{kind}",
                    common | {"expert": demo.SETTINGS["expert"]},
                    partial(_train_expert, base, sizes, kind, stream),
                ),
            )
            for kind, stream in streams.items()
        ]
        case = {"seed": seed, "parameters": model.num_parameters(), "N": len(experts)}
        judge = partial(_judge, model, windows)
        yield Problem(section, case | {"expert_steps": sizes.expert_steps}, base, experts, judge)


def _model(sizes: Sizes) -> LlamaForCausalLM:
    shape = dict(demo.SETTINGS["llama"])
    shape["hidden_size"] *= sizes.width
    shape["intermediate_size"] *= sizes.width
    return LlamaForCausalLM(LlamaConfig(**shape))


def _train_base(seed: int, sizes: Sizes, streams: list[torch.Tensor]) -> State:
    torch.manual_seed(seed)
    model = _model(sizes)
    rate = demo.SETTINGS["base"]["learning_rate"]
    demo.train(model, streams, f"base {seed}", sizes.base_steps, rate)
    return _state(model)


def _train_expert(base: State, sizes: Sizes, kind: str, stream: torch.Tensor) -> State:
    model = _model(sizes)
    _load(model, base)
    rate = demo.SETTINGS["expert"]["learning_rate"]
    demo.train(model, [stream], kind, sizes.expert_steps, rate)
    return _state(model)


def _state(model: LlamaForCausalLM) -> State:
    # The head is the embedding under a second name, and would count twice.
    return {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}


def _load(model: LlamaForCausalLM, state: State) -> None:
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})


@torch.inference_mode()
def _judge(
    model: LlamaForCausalLM, windows: dict[str, torch.Tensor], state: State, task: str
) -> Metrics:
    _load(model, state)
    model.eval()
    loss = model(input_ids=windows[task], labels=windows[task]).loss.item()
    return {"bits per byte": loss / math.log(2)}
