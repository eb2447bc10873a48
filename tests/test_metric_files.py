"""Metrics have the names and shapes of the checkpoint that they are of, and merge with it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import llama, weights_of
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from small_models import SMALL, TEXT, WORDS, by_a_plain_loop, records, small_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mergekit_karcher import fisher_mean, karcher_mean
from mergekit_karcher.metrics import store
from mergekit_karcher.metrics.diagonal import Batch


def test_from_a_text_to_a_merge(run_fisher, text_model, tmp_path, merge):
    other = llama(tmp_path / "other", 1, dtype=torch.bfloat16)
    for name, path in (("first", text_model), ("second", other)):
        result = run_fisher(path, *TEXT, "--out", name)
        assert result.exit_code == 0, result.output
    metric = load_file(tmp_path / "first" / "model.safetensors")
    assert metric.keys() == weights_of(text_model).keys()
    loaded = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32).eval()
    tokens = PreTrainedTokenizerFast.from_pretrained(text_model)(WORDS).input_ids
    windows = torch.tensor(tokens[: len(tokens) // 16 * 16]).view(-1, 16)
    expected = by_a_plain_loop(loaded, Batch(windows))
    for name, tensor in metric.items():
        assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm()
    about = json.loads((tmp_path / "first" / "metric.json").read_text())
    assert (about["examples"], about["tokens"]) == (len(windows), windows.numel())
    assert about["kind"] == "diagonal empirical Fisher information"
    config = {
        "merge_method": "fisher",
        "models": [
            {"model": path, "parameters": {"metric": str(tmp_path / name)}}
            for name, path in (("first", text_model), ("second", other))
        ],
        "dtype": "float32",
    }
    weights = merge(config).weights
    name = "model.layers.1.mlp.up_proj.weight"
    metrics = [load_file(tmp_path / n / "model.safetensors")[name] for n in ("first", "second")]
    inputs = [weights_of(path)[name].float() for path in (text_model, other)]
    assert torch.equal(weights[name], fisher_mean(inputs, metrics))


@pytest.mark.parametrize("prefixed", [True, False])
def test_gpt2_checkpoints_with_and_without_the_name_of_the_trunk(
    run_fisher, text_model, tmp_path, prefixed
):
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=63, n_positions=12)
    network = GPT2LMHeadModel(config).eval()
    shutil.copytree(text_model, tmp_path / "gpt2")
    for path in (tmp_path / "gpt2").glob("*model*"):
        path.unlink()
    network.save_pretrained(tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    if not prefixed:
        short = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
        save_file(short, file, {"format": "pt"})
    # More tokens than it has positions are cut.
    result = run_fisher("gpt2", *TEXT, "--out", "metric")
    assert result.exit_code == 0, result.output
    metric = load_file("metric/model.safetensors")
    assert metric.keys() == load_file(file).keys()
    tokens = PreTrainedTokenizerFast.from_pretrained(text_model)(WORDS).input_ids
    windows = torch.tensor(tokens[: len(tokens) // 12 * 12]).view(-1, 12)
    expected = by_a_plain_loop(network, Batch(windows))["transformer.h.1.mlp.c_fc.weight"]
    tensor = metric[f"{'transformer.' if prefixed else ''}h.1.mlp.c_fc.weight"]
    assert (tensor - expected).norm() <= 1e-5 * expected.norm()


def test_a_tied_head_that_stands_alone(run_fisher, text_model, tmp_path):
    network = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    shutil.copytree(text_model, tmp_path / "tied")
    for path in (tmp_path / "tied").glob("*model*"):
        path.unlink()
    network.save_pretrained(tmp_path / "tied")
    file = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    result = run_fisher("tied", *TEXT, "--out", "metric")
    assert result.exit_code == 0, result.output
    assert load_file("metric/model.safetensors").keys() == tensors.keys()


def test_experts_that_transformers_stacks_are_named_as_in_the_checkpoint(
    run_fisher, text_model, tmp_path, merge
):
    mixture = small_model("mixture")
    shutil.copytree(text_model, tmp_path / "mixture")
    for path in (tmp_path / "mixture").glob("*model*"):
        path.unlink()
    mixture.save_pretrained(tmp_path / "mixture")
    result = run_fisher("mixture", *TEXT, "--out", "metric")
    assert result.exit_code == 0, result.output
    made = load_file(tmp_path / "metric" / "model.safetensors")
    weights = weights_of(tmp_path / "mixture")
    assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in weights.items()}
    tokens = PreTrainedTokenizerFast.from_pretrained(text_model)(WORDS).input_ids
    expected = by_a_plain_loop(mixture, Batch(torch.tensor(tokens[:400]).view(-1, 16)))
    gate, up = expected["model.layers.0.mlp.experts.gate_up_proj"].chunk(2, dim=1)
    for name, part in (("w1", gate), ("w3", up)):
        tensor = made[f"model.layers.0.block_sparse_moe.experts.2.{name}.weight"]
        torch.testing.assert_close(tensor, part[2], rtol=1e-3, atol=1e-9)
    shutil.copytree("mixture", "other")
    generator = torch.Generator().manual_seed(7)
    changed = {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in weights.items()}
    save_file(changed, Path("other", "model.safetensors"), {"format": "pt"})
    Path("other-metric").mkdir()
    flipped = {n: t.flip(0).contiguous() for n, t in made.items()}
    save_file(flipped, Path("other-metric", "model.safetensors"))

    def stacked(tensors):
        part = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
        return torch.stack([tensors[part.format(index)] for index in range(4)])

    inputs = [stacked(weights), stacked(changed)]
    metrics = [stacked(made), stacked(flipped)]
    for method, granularity in (("fisher", ""), ("karcher", "row"), ("karcher", "model")):
        models = [
            {"model": str(tmp_path / name), "parameters": {"metric": str(tmp_path / metric)}}
            for name, metric in (("mixture", "metric"), ("other", "other-metric"))
        ]
        config = {"merge_method": method, "models": models, "dtype": "float32"}
        if granularity:
            config["parameters"] = {"granularity": granularity}
        weights = merge(config, name=f"{method}{granularity}").weights
        # mergekit 0.1.5 writes what transformers stacks as it reads it.
        merged = weights["model.layers.0.mlp.experts.down_proj"]
        if granularity == "model":
            # One pair of coefficients, which keeps the length that averaging would lose.
            columns = torch.stack([i.flatten() for i in inputs], 1).double()
            ratios = torch.linalg.lstsq(columns, merged.double().flatten()).solution
            torch.testing.assert_close(
                columns @ ratios, merged.double().flatten(), rtol=0, atol=1e-7
            )
            assert 1 < ratios.sum() < 1.5
            continue
        if method == "fisher":
            expected = fisher_mean(inputs, metrics)
        else:
            # The rows are the output units of all experts.
            rows = [[tensor.flatten(0, 1) for tensor in of] for of in (inputs, metrics)]
            expected, _ = karcher_mean(rows[0], metrics=rows[1], granularity=granularity)
        assert torch.equal(merged, expected.view_as(merged))


def test_models_that_are_not_whole_or_have_no_such_likelihood(run_fisher, classifier, tmp_path):
    weights = weights_of(tmp_path / classifier)
    config = json.loads((tmp_path / classifier / "config.json").read_text())
    save_file(
        {n: t for n, t in weights.items() if "classifier" not in n},
        tmp_path / classifier / "model.safetensors",
        {"format": "pt"},
    )
    records("rows.jsonl", [{"text": "w1 w2", "label": 1}])
    result = run_fisher(classifier, "--data", "rows.jsonl", "--out", "bad")
    assert "lacks classifier.bias of a BertForSequenceClassification" in result.output
    wrong = {**weights, "classifier.weight": torch.zeros(5, 16)}
    save_file(wrong, tmp_path / classifier / "model.safetensors", {"format": "pt"})
    result = run_fisher(classifier, "--data", "rows.jsonl", "--out", "bad")
    assert "classifier.weight of classifier has not the shape" in result.output
    save_file(weights, tmp_path / classifier / "model.safetensors", {"format": "pt"})
    for change, words in (
        ({"problem_type": "regression"}, "neither a causal language model nor a classifier"),
        ({"architectures": ["NoSuchModel"]}, "asks for NoSuchModel, which this transformers"),
    ):
        (tmp_path / classifier / "config.json").write_text(json.dumps({**config, **change}))
        result = run_fisher(classifier, "--data", "rows.jsonl", "--out", "bad")
        assert words in result.output


def test_large_metrics_are_written_in_shards(text_model, tmp_path, monkeypatch):
    """The same files as huggingface_hub writes, and metric.json."""
    network = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    metric = {name: p.detach() ** 2 for name, p in network.named_parameters()}
    small = partial(store.split_torch_state_dict_into_shards, max_shard_size="20KB")
    monkeypatch.setattr(store, "split_torch_state_dict_into_shards", small)
    store.write_metric(tmp_path / "metric", text_model, network, metric, {})
    (tmp_path / "expected").mkdir()
    # transformers returns what it has renamed in the order of the names.
    metric = dict(sorted(metric.items()))
    save_torch_state_dict(metric, tmp_path / "expected", max_shard_size="20KB")
    written, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("metric", "expected")
    )
    assert len(expected) > 3
    assert json.loads(written.pop("metric.json"))["schema"] == "mergekit-karcher/metric/1"
    assert written == expected
