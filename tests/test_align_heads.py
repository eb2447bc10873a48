"""Alignment of mixtures of experts and of models with other heads: each computes what it did."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import weights_of
from planted import assert_equal_states, run_align
from safetensors.torch import save_file

from mergekit_karcher.align.checkpoint import Checkpoint
from mergekit_karcher.align.families.experts import joined_experts
from mergekit_karcher.errors import KarcherError

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
EXPERTS = GROUPED | {"moe_intermediate_size": 12, "num_experts_per_tok": 2}

MIXTURES = {
    "Mixtral": GROUPED | {"num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen2Moe": EXPERTS | {"num_experts": 5, "shared_expert_intermediate_size": 10},
    "Qwen3Moe": EXPERTS | {"num_experts": 5, "head_dim": 8, "mlp_only_layers": [0]},
}
HEADS = {
    "LlamaForSequenceClassification": GROUPED,
    "LlamaForTokenClassification": GROUPED,
    "LlamaForQuestionAnswering": GROUPED,
    "GPT2ForSequenceClassification": GPT2,
    "GPT2ForTokenClassification": GPT2,
    "GPT2ForQuestionAnswering": GPT2,
    "GPTNeoXForSequenceClassification": SMALL,
    "GPTNeoXForTokenClassification": SMALL,
    "GPTNeoXForQuestionAnswering": SMALL,
    "BertForSequenceClassification": SMALL,
    "BertForTokenClassification": SMALL,
    "BertForQuestionAnswering": SMALL,
    "BertForNextSentencePrediction": SMALL,
    "Phi3ForSequenceClassification": GROUPED,
}


def saved(folder, architecture, options, seed):
    """A model whose every parameter is random, in float32."""
    torch.manual_seed(seed)
    kind = architecture.partition("For")[0].removesuffix("Model")
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def outputs_of(folder):
    """All floating outputs of the model in a folder, which must have every weight that it needs."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    with torch.no_grad():
        result = model.eval()(input_ids=torch.arange(15)[None] * 3 % 37 + 1, use_cache=False)
    return [value for value in result.values() if isinstance(value, torch.Tensor)]


def assert_aligned_models_compute_the_same(tmp_path, architecture, options, *arguments):
    models = [saved(tmp_path / f"m{seed}", architecture, options, seed) for seed in range(2)]
    result = run_align(*models, "--out", tmp_path / "aligned", *arguments)
    assert result.exit_code == 0, result.output
    before, after = (weights_of(folder / "m1") for folder in (tmp_path, tmp_path / "aligned"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for model in models:
        pairs = zip(outputs_of(model), outputs_of(tmp_path / "aligned" / model.name), strict=True)
        for expected, reached in pairs:
            torch.testing.assert_close(reached, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_of_experts_compute_the_same(kind, residual, tmp_path):
    arguments = ["--residual"] if residual else []
    architecture = f"{kind}ForCausalLM"
    assert_aligned_models_compute_the_same(tmp_path, architecture, MIXTURES[kind], *arguments)


@pytest.mark.parametrize("architecture", HEADS)
def test_every_head_follows_the_residual_stream(architecture, tmp_path):
    options = HEADS[architecture]
    assert_aligned_models_compute_the_same(tmp_path, architecture, options, "--residual")


def with_moved_experts(state, seed):
    """The same mixture: experts, their neurons and the rows of their routers in random orders."""
    generator = torch.Generator().manual_seed(seed)
    moved = dict(state)
    for router in (name for name in state if name.endswith(("mlp.gate.weight", "moe.gate.weight"))):
        start = router.removesuffix("gate.weight")
        order = torch.randperm(len(state[router]), generator=generator).tolist()
        moved[router] = state[router][order]
        for place, source in enumerate(order):
            names = {n for n in state if n.startswith(f"{start}experts.{source}.")}
            neurons = None
            for name in sorted(names):
                axis = 1 if "w2" in name or "down" in name else 0
                if neurons is None:
                    neurons = torch.randperm(state[name].shape[axis], generator=generator)
                target = name.replace(f"experts.{source}.", f"experts.{place}.")
                moved[target] = state[name].index_select(axis, neurons)
    return {name: tensor.contiguous() for name, tensor in moved.items()}


@pytest.mark.parametrize("kind", MIXTURES)
def test_planted_orders_of_experts_are_found(kind, tmp_path):
    first = saved(tmp_path / "first", f"{kind}ForCausalLM", MIXTURES[kind], 0)
    second = saved(tmp_path / "second", f"{kind}ForCausalLM", MIXTURES[kind], 0)
    moved = with_moved_experts(weights_of(first), 4)
    save_file(moved, second / "model.safetensors", metadata={"format": "pt"})
    result = run_align(first, second, "--out", tmp_path / "aligned")
    assert result.exit_code == 0, result.output
    assert_equal_states(weights_of(tmp_path / "aligned" / "second"), weights_of(first))
    again = run_align(
        *(first, second, "--out", tmp_path / "again"),
        *("--alignment", tmp_path / "aligned" / "alignment.json"),
    )
    assert again.exit_code == 0, again.output
    assert_equal_states(weights_of(tmp_path / "again" / "second"), weights_of(first))


def test_experts_that_are_missing_or_unlike_are_named():
    shapes = {f"model.layers.0.mlp.experts.{n}.up_proj.weight": (4, 6) for n in (0, 1, 3)}
    with pytest.raises(KarcherError, match=r"layers.0.mlp.experts.up_proj.weight are not complete"):
        joined_experts(shapes)


def test_what_is_not_covered_is_said_before_anything_is_read(tmp_path, monkeypatch):
    model = saved(tmp_path / "m", "LlamaForCausalLM", GROUPED, 0)
    other = saved(tmp_path / "other", "LlamaForCausalLM", GROUPED, 1)
    state = weights_of(model) | {"model.layers.0.self_attn.memory.weight": torch.zeros(2, 2)}
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("weights were read"))
    result = run_align(model, other, "--out", tmp_path / "aligned")
    words = (
        "Align does not know model.layers.0.self_attn.memory.weight in a model of the type llama"
    )
    assert (result.exit_code, words in result.stderr) == (1, True), result.stderr
    assert not (tmp_path / "aligned").exists()


@pytest.mark.parametrize("architecture", ["LlamaModel", "GPT2Model", "BertModel"])
def test_the_output_of_a_model_without_a_head_is_not_reordered(architecture, tmp_path):
    options = GPT2 if architecture == "GPT2Model" else GROUPED
    if architecture == "BertModel":
        options = SMALL
    assert_aligned_models_compute_the_same(tmp_path, architecture, options)
    models = (tmp_path / "m0", tmp_path / "m1")
    refused = run_align(*models, "--out", tmp_path / "x", "--residual")
    words = f"would reorder what a {architecture} returns"
    assert (refused.exit_code, words in refused.stderr) == (1, True)
