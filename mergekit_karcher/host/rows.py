"""Which axis of a weight its output units lie on: the rows of `granularity: row`."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

import torch

# Families whose linear layers are stored as (in, out): transformers' Conv1D.
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder", "jais"}
_CONV1D_NAME = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc2?)\.weight$")

# Families whose fused experts are stored as (expert, in, out); those of all others as (expert, out,
# in), which is what transformers' experts have unless they say `is_transposed`, or are transposed
# when a checkpoint is read.
_TRANSPOSED_EXPERTS = {"aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe"}
# Tables that are looked up by index: their rows are not multiplied with an input.
_EMBEDDING_NAME = re.compile(
    r"(^|[._])(embed(?!_out)\w*|wte|wpe|shared|relative_attention_bias|position\w*|token_type\w*|pos_emb\w*)\."
)
_HEAD_NAME = re.compile(r"(^|\.)(lm_head|embed_out|output|head|proj_out|score)\.weight$")
_EXPERTS_NAME = re.compile(r"(^|\.)(experts\.\w+|block_sparse_moe\.(input|output)_linear\.weight)$")


class RowLayout(enum.Enum):
    """How the output units of a weight are stored."""

    FIRST = "(out, ...)"
    SECOND = "(in, out)"
    EXPERTS = "(expert, out, in)"
    TRANSPOSED_EXPERTS = "(expert, in, out)"

    def rows_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with one output unit at each index of its first axis; a view where it can be."""
        if self is RowLayout.SECOND:
            return tensor.transpose(0, 1)
        if self is RowLayout.EXPERTS:
            return tensor.flatten(0, 1)
        if self is RowLayout.TRANSPOSED_EXPERTS:
            return tensor.transpose(1, 2).flatten(0, 1)
        return tensor

    def layers(self, tensor: torch.Tensor) -> torch.Tensor:
        """A weight as (out, in), stacked experts as (expert, out, in); a view where it can be."""
        if self is RowLayout.SECOND:
            return tensor.transpose(0, 1)
        if self is RowLayout.TRANSPOSED_EXPERTS:
            return tensor.transpose(1, 2)
        return tensor if self is RowLayout.EXPERTS else tensor.flatten(1)

    def from_layers(self, layers: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The contiguous tensor of that shape whose `layers` those are."""
        if self is RowLayout.SECOND:
            return layers.transpose(0, 1).contiguous()
        if self is RowLayout.TRANSPOSED_EXPERTS:
            return layers.transpose(1, 2).contiguous()
        return layers.reshape(shape)

    def restored(self, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The contiguous tensor of that shape whose `rows_first` those rows are."""
        if self is RowLayout.SECOND:
            return rows.transpose(0, 1).contiguous()
        if self is RowLayout.EXPERTS:
            return rows.reshape(shape)
        if self is RowLayout.TRANSPOSED_EXPERTS:
            experts, inner, outer = shape
            return rows.reshape(experts, outer, inner).transpose(1, 2).contiguous()
        return rows


def row_layout(model_type: str | None, name: str, axes: int) -> RowLayout:
    """How a family stores a weight.

    model_type: of its config in transformers; None for a raw checkpoint, whose rows are those of
    the first axis. axes: how many the weight has.
    """
    if model_type in _CONV1D and axes == 2 and _CONV1D_NAME.search(name):
        return RowLayout.SECOND
    if model_type is not None and axes == 3 and _EXPERTS_NAME.search(name):
        transposed = model_type in _TRANSPOSED_EXPERTS
        return RowLayout.TRANSPOSED_EXPERTS if transposed else RowLayout.EXPERTS
    return RowLayout.FIRST


def is_layer(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of that name and shape is multiplied with the inputs of a layer.

    Neither are embeddings, nor convolutions of one channel each, which share no input.
    """
    is_weight = name.endswith(("weight", ".in_proj_weight")) or _EXPERTS_NAME.search(name)
    if len(shape) < 2 or not is_weight:
        return False
    if len(shape) == 2:
        return not _EMBEDDING_NAME.search(name)
    return _EXPERTS_NAME.search(name) is not None or shape[1] > 1


def is_head(name: str) -> bool:
    """Whether a tensor is called like the layer that makes scores of hidden states."""
    return _HEAD_NAME.search(name) is not None
