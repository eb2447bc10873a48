"""Networks of every family, small and in float64, and the same in a random allowed order.

With what every test of alignment needs: the command, and how states are ordered and compared.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from click.testing import CliRunner
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mergekit_karcher.align.families import specification_for, stack
from mergekit_karcher.align.orders import arranged
from mergekit_karcher.cli.main import main

_GROUPED = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
}
HF = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**{k: v for k, v in _GROUPED.items() if k != "head_dim"})
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_GROUPED)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GROUPED)),
    "gemma3_text": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_GROUPED)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_GROUPED, pad_token_id=0)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_positions=20, n_embd=24, n_layer=2, n_head=4)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=60,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
        )
    ),
    "bert": lambda: BertForMaskedLM(
        BertConfig(
            vocab_size=60,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=20,
        )
    ),
}

FAMILIES = sorted(HF)
SILENT = [].append


def run_align(*arguments):
    """Run `mergekit-karcher align`; returns click's result."""
    return CliRunner().invoke(main, ["align", *map(str, arguments)])


def align_stacks(*arguments):
    """Run it on raw checkpoints that are plain stacks."""
    return run_align(*arguments, "--assume-stack")


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def aligned(state, orders):
    return {name: arranged(tensor, name, orders) for name, tensor in state.items()}


def assert_equal_states(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def everything():
    """Every axis of every tensor, as fixed."""
    return tuple(("*", axis) for axis in range(4))


def hf_model(family, seed=0):
    """A model whose every parameter is random, norms and biases too, in float64."""
    torch.manual_seed(seed)
    model = HF[family]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return in_float64(model)


def in_float64(model):
    """The model, computing in float64 throughout."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _rms_norm(module)
    return model


def _rms_norm(module):
    """What the module computes, without its detour by float32, which rounds sums by their order."""
    shift = 1 if "Gemma" in type(module).__name__ else 0
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps

    def forward(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (module.weight + shift)

    return forward


def state_of(model):
    """The tensors that a checkpoint would hold, tied ones once."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    shared = model.config.tie_word_embeddings if hasattr(model, "config") else False
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if not (shared and name in tied)
    }


def logits(model, state):
    """What the model computes with those weights."""
    model.load_state_dict(state, strict=False)
    model.tie_weights() if hasattr(model, "tie_weights") else None
    tokens = torch.arange(15)[None] * 3 % 60
    with torch.no_grad():
        return model(tokens).logits


def stack_of(state):
    """The specification of a plain stack of layers."""
    return stack.specification(shapes_of(state))


def specification(model, state, residual=False):
    return specification_for(model.config.to_dict(), shapes_of(state), residual)


def scrambled(state, spec, seed):
    """The same network, every symmetry and all inside of it in a random order."""
    rng = np.random.default_rng(seed)
    state = {name: tensor.clone() for name, tensor in state.items()}
    for symmetry in spec.symmetries:
        order = rng.permutation(symmetry.size)
        inner = [[list(range(move.block)) for _ in order] for move in symmetry.moves]
        for inside in symmetry.inside:
            for place in range(symmetry.size):
                permutation = rng.permutation(inside.size)
                for move in inside.moves:
                    old = inner[move.move][place]
                    new = list(old)
                    for i, j in enumerate(permutation):
                        for k in range(move.block):
                            new[move.offset + i * move.block + k] = old[
                                move.offset + j * move.block + k
                            ]
                    inner[move.move][place] = new
        for move, blocks in zip(symmetry.moves, inner, strict=True):
            length = state[move.tensor].shape[move.axis]
            index = list(range(length))
            for place, unit in enumerate(order):
                for k in range(move.block):
                    index[move.offset + place * move.block + k] = (
                        move.offset + int(unit) * move.block + blocks[place][k]
                    )
            state[move.tensor] = state[move.tensor].index_select(move.axis, torch.tensor(index))
    return state


def mlp(seed, widths=(20, 16, 12, 5), numbers=(0, 2, 4)):
    """Tensors of an `nn.Sequential` of linear layers with activations between, float64."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for number, (fan_in, fan_out) in zip(numbers, itertools.pairwise(widths), strict=True):
        state[f"{number}.weight"] = torch.randn(
            fan_out, fan_in, generator=generator, dtype=torch.float64
        )
        state[f"{number}.bias"] = torch.randn(fan_out, generator=generator, dtype=torch.float64)
    return state


class ConvNet(nn.Sequential):
    """Two convolutions with batch norm and a head that reads the pixels of every channel."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 10),
            nn.ReLU(),
            nn.Linear(10, 4),
        )


def conv_net(seed):
    """Such a network in float64 and evaluation mode, with statistics unlike those of the start."""
    torch.manual_seed(seed)
    net = ConvNet().double().eval()
    with torch.no_grad():
        for module in net:
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.add_(torch.randn_like(tensor))
                module.running_var.add_(torch.rand_like(module.running_var))
                module.num_batches_tracked.fill_(7 + seed)
    return net
