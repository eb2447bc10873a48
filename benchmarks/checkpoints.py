"""Random Llama checkpoints, written shard by shard so that little of them is ever in memory."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from contestants import FINE_TUNE_ANGLE
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

Shapes = dict[str, tuple[int, ...]]

_HEAD = 128


def write_checkpoints(folder: Path, parameters: int, models: int) -> tuple[list[Path], int]:
    """Fine-tunes of one random base, bf16, about that many parameters: folders and the true count.

    A shard for each layer, one before and one after them.
    """
    width = min(
        (_HEAD * heads for heads in range(2, 129)), key=lambda width: abs(_size(width) - parameters)
    )
    shards = _shards(width)
    folders = [folder / f"model-{index}" for index in range(models)]
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    for path in folders:
        _config(width).save_pretrained(path)
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        files |= dict.fromkeys(shapes, file)
        _write_shard([path / file for path in folders], shapes, generator)
    index = {"metadata": {"total_size": 2 * _size(width)}, "weight_map": files}
    for path in folders:
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return folders, _size(width)


def write_tokenizer(model: Path) -> None:
    """One token a byte."""
    letters = sorted(ByteLevel.alphabet())
    core = Tokenizer(BPE({letter: index for index, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(model)


def write_metric(model: Path, folder: Path) -> None:
    """A float32 metric of a checkpoint: the squares of its weights, shard by shard."""
    folder.mkdir()
    for path in model.glob("*.safetensors"):
        squares = {name: tensor.float().square() for name, tensor in load_file(path).items()}
        save_file(squares, folder / path.name, metadata={"format": "pt"})
    index = "model.safetensors.index.json"
    shutil.copyfile(model / index, folder / index)


def _write_shard(paths: list[Path], shapes: Shapes, generator: torch.Generator) -> None:
    sizes = [math.prod(shape) for shape in shapes.values()]
    base, noise = (torch.randn(sum(sizes), generator=generator) for _ in range(2))
    noise.mul_(math.tan(FINE_TUNE_ANGLE))
    for number, path in enumerate(paths, 1):
        # Shifted noise is as good as new noise, and much quicker.
        shift = number * sum(sizes) // (len(paths) + 1)
        parts = noise.roll(shift).add_(base).mul_(0.02).bfloat16().split(sizes)
        named = zip(shapes.items(), parts, strict=True)
        tensors = {name: part.view(shape) for (name, shape), part in named}
        save_file(tensors, path, metadata={"format": "pt"})


def _size(width: int) -> int:
    return sum(math.prod(shape) for shapes in _shards(width) for shape in shapes.values())


def _inner(width: int) -> int:
    return _HEAD * round(8 / 3 * width / _HEAD)


def _config(width: int) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        hidden_size=width,
        intermediate_size=_inner(width),
        num_hidden_layers=width // _HEAD,
        num_attention_heads=width // _HEAD,
        num_key_value_heads=width // _HEAD,
        vocab_size=16 * width,
        tie_word_embeddings=False,
    )


def _shards(width: int) -> list[Shapes]:
    inner = _inner(width)
    layer: Shapes = {
        "input_layernorm": (width,),
        **{f"self_attn.{name}_proj": (width, width) for name in "qkvo"},
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    layers = [
        {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        for index in range(width // _HEAD)
    ]
    first: Shapes = {"model.embed_tokens.weight": (16 * width, width)}
    last: Shapes = {"model.norm.weight": (width,), "lm_head.weight": (16 * width, width)}
    return [first, *layers, last]
