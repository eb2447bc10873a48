"""Tiny Llama experts for three kinds of text, trained as the demo trains them, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import train as demo
from cache import cached
from from_data import diagonal_fisher, input_grams, windows_of_own
from problem import Data, Expert, Metrics, Problem, State
from texts import KINDS, load
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_karcher.metrics.diagonal import Batch

# Gradients of so many windows are held at once.
_BATCH = 8


@dataclass(frozen=True)
class Sizes:
    """Width relative to the demo's model, and steps of training."""

    width: int = 1
    base_steps: int = demo.SETTINGS["base"]["steps"]
    expert_steps: int = demo.SETTINGS["expert"]["steps"]


LARGER = Sizes(width=2)
LONG = Sizes(expert_steps=5 * demo.SETTINGS["expert"]["steps"])


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
    model = model_of(sizes)
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
            partial(train_base, seed, sizes, list(streams.values())),
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
        case["expert_steps"] = sizes.expert_steps
        seen = partial(windows_of_own, streams, demo.SETTINGS["context"], seed)
        data = Data(partial(_grams, model, seen), partial(_fisher, model, seen), seen)
        yield Problem(section, case, base, experts, partial(judge, model, windows), data)


def model_of(sizes: Sizes) -> LlamaForCausalLM:
    """The demo's model, wider, with random weights."""
    shape = dict(demo.SETTINGS["llama"])
    shape["hidden_size"] *= sizes.width
    shape["intermediate_size"] *= sizes.width
    return LlamaForCausalLM(LlamaConfig(**shape))


def train_base(seed: int, sizes: Sizes, streams: list[torch.Tensor]) -> State:
    """The base that experts come from."""
    torch.manual_seed(seed)
    model = model_of(sizes)
    rate = demo.SETTINGS["base"]["learning_rate"]
    demo.train(model, streams, f"base {seed}", sizes.base_steps, rate)
    return state_of(model)


def _train_expert(base: State, sizes: Sizes, kind: str, stream: torch.Tensor) -> State:
    model = model_of(sizes)
    load_state(model, base)
    rate = demo.SETTINGS["expert"]["learning_rate"]
    demo.train(model, [stream], kind, sizes.expert_steps, rate)
    return state_of(model)


def _grams(
    model: LlamaForCausalLM, seen: Callable[[Expert, int], torch.Tensor], own: Expert, count: int
) -> State:
    load_state(model, own.state)
    model.eval()
    return input_grams(model, lambda: model(input_ids=seen(own, count)))


def _fisher(
    model: LlamaForCausalLM, seen: Callable[[Expert, int], torch.Tensor], own: Expert, count: int
) -> State:
    load_state(model, own.state)
    return diagonal_fisher(model, map(Batch, seen(own, count).split(_BATCH)))


def state_of(model: LlamaForCausalLM) -> State:
    """A copy of its weights."""
    # The head is the embedding under a second name, and would count twice.
    return {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}


def load_state(model: LlamaForCausalLM, state: State) -> None:
    """Give it weights."""
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})


@torch.inference_mode()
def judge(
    model: LlamaForCausalLM, windows: dict[str, torch.Tensor], state: State, task: str
) -> Metrics:
    """Bits per byte on the held-out text of one kind."""
    load_state(model, state)
    model.eval()
    loss = model(input_ids=windows[task], labels=windows[task]).loss.item()
    return {"bits per byte": loss / math.log(2)}
