"""Merges in matrix metrics, and making such metrics, against plain averages and forward passes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from checkpoints import write_tokenizer
from contestants import LINEAR
from merges import made, watch, whole_rows
from rows import Row, interleave, timed_rows
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_karcher import fisher_mean

SELF, INPUTS, FORWARD = "metric: self", "activations", "forward passes"
REPORT = "report"
_MODELS = 3


def own_changes(layers: int, scratch: Path | None, rounds: int) -> Iterator[Row]:
    """Fine-tunes of the shape of SmolLM2-135M, merged by whole processes; and their report."""
    with tempfile.TemporaryDirectory(prefix="karcher-benchmark-", dir=scratch) as name:
        folder = Path(name)
        parameters = _write_models(folder, layers, _MODELS + 1)
        os.sync()
        calls = {how: partial(_merge, how, folder) for how in (LINEAR, SELF, REPORT)}
        case = {"parameters": f"{parameters / 1e9:.3g}e9", "models": _MODELS, "dtype": "bf16"}
        yield from whole_rows(case, interleave(calls, dict.fromkeys(calls, rounds)), "own changes")


def inputs(
    layers: int, scratch: Path | None, rounds: int, count: int = 16, length: int = 128
) -> Iterator[Row]:
    """Input Grams from windows of a text, against the forward passes that they need."""
    with tempfile.TemporaryDirectory(prefix="karcher-benchmark-", dir=scratch) as name:
        folder = Path(name)
        parameters = _write_models(folder, layers, 1)
        model, text = folder / "model-0", folder / "text.txt"
        write_tokenizer(model)
        text.write_text("".join(chr(97 + i * i % 23) for i in range(length * count)))
        ours = ["fisher", model, "--kind", "activations", "--data", text, "--length", length]
        ours += ["--examples", count, "--out"]
        rival = [Path(__file__).with_name("plain_forward.py"), model, text, length, count]
        calls = {
            FORWARD: partial(made, "python", rival, folder),
            INPUTS: partial(made, "mergekit-karcher", ours, folder),
        }
        case = {"parameters": f"{parameters / 1e9:.3g}e9", "windows": count, "tokens": length}
        yield from whole_rows(case, interleave(calls, dict.fromkeys(calls, rounds)), "inputs")


def solves(shapes: Sequence[tuple[int, int]], rounds: int, device: str = "cpu") -> Iterator[Row]:
    """One layer of bf16 fine-tunes, by its shape."""
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)
        base, *changes = (torch.randn(shape, generator=generator) for _ in range(_MODELS + 1))
        layers = [(base + 0.01 * change).bfloat16().to(device) for change in changes]
        around = base.bfloat16().to(device)
        calls: dict[str, Callable[[], Any]] = {
            LINEAR: partial(_mean, layers),
            SELF: partial(fisher_mean, layers, "self", base=around),
        }
        times = interleave(
            {how: partial(_seconds, call, device) for how, call in calls.items()},
            dict.fromkeys(calls, 1 if max(shape) > 8192 and device == "cpu" else rounds),
        )
        case = {"out": shape[0], "in": shape[1], "models": _MODELS, "device": _named(device)}
        yield from timed_rows("solves", case, times, {how: {} for how in calls})


def _mean(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([*layers]).mean(0)


def _seconds(call: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _named(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _write_models(folder: Path, layers: int, count: int) -> int:
    """Random models of the shape of SmolLM2-135M, the first the base of the others: its size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index in range(count):
        model.save_pretrained(folder / f"model-{index}")
        changed = {n: t + 0.002 * torch.randn_like(t) for n, t in base.items()}
        model.load_state_dict(changed)
    return sum(parameter.numel() for parameter in model.parameters())


def _merge(how: str, folder: Path) -> dict[str, float]:
    base, *models = (str(folder / f"model-{index}") for index in range(_MODELS + 1))
    document: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": model, "parameters": {"weight": 1.0}} for model in models],
        "dtype": "bfloat16",
    }
    if how != LINEAR:
        document |= {"merge_method": "fisher", "base_model": base}
        document |= {"parameters": {"metric": "self"}}
    config, out = folder / "config.yml", folder / "out"
    config.write_text(yaml.safe_dump(document))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if how == REPORT:
        words = ["report", str(config), "--out", str(out)]
        measured = watch(words, folder / "log", environment, command="mergekit-karcher")
    else:
        measured = watch(
            [str(config), str(out), "--no-copy-tokenizer"], folder / "log", environment
        )
    shutil.rmtree(out)
    return measured
