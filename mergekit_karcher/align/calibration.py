"""The networks that `repair` compares, and the calibration data that they are run on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from mergekit_karcher.align.checkpoint import Checkpoint
from mergekit_karcher.align.families import stack
from mergekit_karcher.align.repair import Run
from mergekit_karcher.errors import KarcherError, first_line

# Tokens of a text that are read together, and how many of these windows are used at most.
_WINDOW = 64
_MOST_WINDOWS = 64


class Calibration(NamedTuple):
    """load: makes the network of a checkpoint, by its reference. run: runs it on the data."""

    load: Callable[[str], nn.Module]
    run: Run


class Stack(nn.Module):
    """Linear layers with ReLU between them, (samples, width) to (samples, width), in float32.

    names: the layers in the order of the data, as the raw checkpoint calls them.
    tensors: the weight of each, and its bias if it has one; copied.
    """

    def __init__(self, names: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            outputs, inputs = tensors[f"{name}.weight"].shape
            parent: nn.Module = self
            *outer, last = name.split(".")
            for part in outer:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, nn.Linear(inputs, outputs, f"{name}.bias" in tensors))
        self.requires_grad_(False).load_state_dict(tensors, strict=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, name in enumerate(self.names):
            x = self.get_submodule(name)(x if number == 0 else x.relu())
        return x


def check_linear(checkpoint: Checkpoint) -> None:
    """Raise `KarcherError` if a raw checkpoint has other layers than linear ones."""
    for name, shape in checkpoint.shapes.items():
        # A weight of one axis is that of a norm.
        if len(shape) > 2 or "running" in name or (name.endswith("weight") and len(shape) < 2):
            raise KarcherError(
                f"{checkpoint.reference} is no stack of linear layers alone, as {name} shows, so "
                "what lies between its layers is not known: use mergekit_karcher.align.repair on "
                "the module itself."
            )


def for_stack(checkpoint: Checkpoint, data: Path) -> Calibration:
    """Calibrate stacks with the linear layers of a checkpoint by one tensor of inputs in a file.

    Raises `KarcherError` if the file holds no tensor.
    """
    names = stack.layers_in(stack.specification(checkpoint.shapes))
    inputs = _tensor_in(data).flatten(1).float()

    def load(reference: str) -> nn.Module:
        parent = Checkpoint(reference, "parent")
        return Stack(names, {name: parent.read(name) for name in parent.shapes})

    return Calibration(load, lambda network: network(inputs))


def for_language_model(references: Sequence[str], data: Path) -> Calibration:
    """Calibrate language models by up to 4096 tokens of a text, by the first tokenizer among them.

    Raises `KarcherError` if the text is too short.
    """
    from transformers import AutoModel

    tokens = _tokenizer_of(references)(data.read_text(encoding="utf-8")).input_ids
    count = min(len(tokens) // _WINDOW, _MOST_WINDOWS)
    if count == 0:
        raise KarcherError(f"{data} has {len(tokens)} tokens: give a text of at least {_WINDOW}.")
    windows = torch.tensor(tokens[: count * _WINDOW]).view(count, _WINDOW)

    def load(reference: str) -> nn.Module:
        # No head is needed, and not all have the same.
        model, info = AutoModel.from_pretrained(
            os.path.expanduser(reference), dtype=torch.float32, output_loading_info=True
        )
        lacking = [name for name in info["missing_keys"] if "pooler" not in name]
        if lacking:
            raise KarcherError(
                f"{reference} has no {min(lacking)}, which a {type(model).__name__} has: repair "
                "cannot run it."
            )
        network: nn.Module = model.eval()
        return network

    return Calibration(load, lambda network: network(input_ids=windows))


def _tokenizer_of(references: Sequence[str]) -> Any:
    from transformers import AutoTokenizer

    why = ""
    for reference in references:
        try:
            return AutoTokenizer.from_pretrained(os.path.expanduser(reference))
        except Exception as error:  # transformers raises errors of many kinds
            why = why or first_line(error).rstrip(".")
    raise KarcherError(
        f"Neither {references[0]} nor its parents have a tokenizer that transformers can load "
        f"({why}): copy the tokenizer's files into {references[0]}."
    )


def _tensor_in(data: Path) -> torch.Tensor:
    """The tensor in a file, or the first one of a dictionary of tensors."""
    content: object
    try:
        if data.suffix == ".safetensors":
            content = load_file(data)
        else:
            content = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises errors of many kinds
        why = first_line(error).rstrip(".")
    else:
        if isinstance(content, Mapping):
            content = next(iter(content.values()), None)
        if isinstance(content, torch.Tensor) and content.ndim > 1:
            return content.detach()
        why = "what it holds is something else"
    raise KarcherError(
        f"{data} holds no tensor of inputs ({why}): save one of shape (samples, ...), by "
        "torch.save or as .safetensors."
    )
