"""The networks that `repair` compares, and the calibration data that they are run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from mergekit_karcher.align.checkpoint import Checkpoint
from mergekit_karcher.align.families import specification_for
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
    """Linear layers with ReLU between them, under the names that a raw checkpoint has for them.

    Arguments:
        names: The layers, in the order in which the data passes them.
        tensors: The weight of each, and its bias if it has one; copied to float32.
    """

    def __init__(self, names: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
            layer.weight = nn.Parameter(weight.float(), requires_grad=False)
            if bias is not None:
                layer.bias = nn.Parameter(bias.float(), requires_grad=False)
            parent: nn.Module = self
            *outer, last = name.split(".")
            for part in outer:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of the last layer, (samples, width), for inputs (samples, width)."""
        for number, name in enumerate(self.names):
            x = self.get_submodule(name)(x if number == 0 else x.relu())
        return x


def for_stack(checkpoint: Checkpoint, data: Path) -> Calibration:
    """Calibrate plain stacks of linear layers.

    Arguments:
        checkpoint: One of them; all have its layers.
        data: A file with one tensor of inputs, samples first.

    Raises:
        KarcherError: If the checkpoint has other layers, too, or data holds no tensor.
    """
    if any(len(shape) > 2 or "running" in name for name, shape in checkpoint.shapes.items()):
        raise KarcherError(
            f"{checkpoint.reference} is no stack of linear layers alone, so what lies between its "
            "layers is not known: use mergekit_karcher.align.repair on the module itself."
        )
    specification = specification_for(None, checkpoint.shapes, residual=False)
    # The last hidden units are read by the last layer, which has no symmetry of its own.
    last = next(m.tensor for m in specification.symmetries[-1].moves if m.axis == 1)
    names = [*(s.name for s in specification.symmetries), last.removesuffix(".weight")]
    inputs = _tensor_in(data).flatten(1).float()

    def load(reference: str) -> nn.Module:
        parent = Checkpoint(reference, "parent")
        return Stack(names, {name: parent.read(name) for name in parent.shapes})

    return Calibration(load, lambda network: network(inputs))


def for_language_model(reference: str, data: Path) -> Calibration:
    """Calibrate language models.

    Arguments:
        reference: One of them, whose tokenizer is used.
        data: A text, of which up to 4096 tokens are used.

    Raises:
        KarcherError: If the text is too short.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(reference)(data.read_text(encoding="utf-8")).input_ids
    count = min(len(tokens) // _WINDOW, _MOST_WINDOWS)
    if count == 0:
        raise KarcherError(f"{data} has {len(tokens)} tokens: give a text of at least {_WINDOW}.")
    windows = torch.tensor(tokens[: count * _WINDOW]).view(count, _WINDOW)

    def load(reference: str) -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
        return model.eval()

    return Calibration(load, lambda network: network(input_ids=windows))


def _tensor_in(data: Path) -> torch.Tensor:
    """The tensor in a file, or the first one of a dictionary of tensors."""
    content: object
    try:
        if data.suffix == ".safetensors":
            content = load_file(data)
        else:
            content = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises errors of many kinds
        raise _no_tensor(data, first_line(error)) from None
    if isinstance(content, Mapping):
        content = next(iter(content.values()), None)
    if not isinstance(content, torch.Tensor) or content.ndim < 2:
        raise _no_tensor(data, "what it holds is something else")
    return content


def _no_tensor(data: Path, why: str) -> KarcherError:
    return KarcherError(
        f"{data} holds no tensor of inputs ({why.rstrip('.')}): save one of shape (samples, ...), "
        "by torch.save or as .safetensors."
    )
