"""Stands in for the module tests.common of mergekit's suite, which its source archive lacks.

Tiny models that the suite merges, and a merge whose output is checked. Written from what the tests
ask for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def make_picollama(path: str | Path, vocab_size: int = 64) -> str:
    """A random Llama model whose head is not tied; returns its folder."""
    config = LlamaConfig(**_SMALL, vocab_size=vocab_size)
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def make_picogranite(path: str | Path, vocab_size: int = 64) -> str:
    """A random Granite model; returns its folder."""
    config = GraniteConfig(**_SMALL, vocab_size=vocab_size)
    GraniteForCausalLM(config).save_pretrained(path)
    return str(path)


def make_gpt2size(path: str | Path, vocab_size: int = 64) -> str:
    """A random model with GPT-2's 12 layers, which are narrow; returns its folder."""
    config = GPT2Config(n_embd=24, n_head=4, n_layer=12, n_ctx=128, vocab_size=vocab_size)
    GPT2LMHeadModel(config).save_pretrained(path)
    return str(path)


def make_picoLlaVa(path: str | Path) -> str:
    """A random model of pictures and text; returns its folder."""
    sight = CLIPVisionConfig(**_SMALL, image_size=32, patch_size=16)
    text = LlamaConfig(**_SMALL, vocab_size=64)
    config = LlavaConfig(vision_config=sight, text_config=text, image_token_index=63)
    LlavaForConditionalGeneration(config).save_pretrained(path)
    return str(path)


def run_and_check_merge(
    config: MergeConfiguration,
    validate: Callable[[str], None] | None = None,
    auto_arch: bool = False,
) -> None:
    """Merge, and check that every tensor that the architecture needs was written and is finite.

    Arguments:
        config: what is merged.
        validate: called with the output folder at the end.
        auto_arch: the tests say by it that mergekit has no definition of this architecture, and
            infers one from the inputs. Here it makes no difference.
    """
    options = MergeOptions()
    with tempfile.TemporaryDirectory() as folder:
        run_merge(config, out_path=folder, options=options)
        loader = LazyTensorLoader.from_disk(folder)
        written = set(loader.index.tensor_paths)
        architecture = get_architecture_info(config, options)
        weights = architecture.all_weights(AutoConfig.from_pretrained(folder))
        missing = {weight.name for weight in weights if not weight.optional} - written
        assert not missing, f"missing from the merge: {sorted(missing)}"
        for name in written:
            assert torch.isfinite(loader.get_tensor(name)).all(), f"NaN or Inf in {name}"
        if validate is not None:
            validate(folder)
