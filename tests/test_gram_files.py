"""Metrics from activations in files: their names, merges with them, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_error, llama, weights_of
from safetensors.torch import load_file, save_file
from small_models import SMALL, TEXT, records, small_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mergekit_karcher import InputGram, fisher_mean
from mergekit_karcher.metrics import low_rank

KIND = ("--kind", "activations")


def put_beside(text_model, network, folder):
    """A network with the tokenizer of a language model."""
    shutil.copytree(text_model, folder)
    for path in Path(folder).glob("*model*"):
        path.unlink()
    network.save_pretrained(folder)


def other_than(folder, path):
    """A model near another one."""
    shutil.copytree(folder, path)
    generator = torch.Generator().manual_seed(7)
    for file in Path(path).glob("*.safetensors"):
        near = {
            n: t + 0.1 * t.std(correction=0) * torch.randn(t.shape, generator=generator)
            for n, t in load_file(file).items()
        }
        save_file(near, file, {"format": "pt"})


def measured(run_fisher, model, out, *more):
    result = run_fisher(model, *KIND, *TEXT, *more, "--out", out)
    assert result.exit_code == 0, result.output
    return Path(out)


def fisher_config(tmp_path, metrics, **settings):
    """A merge of models by their metrics, both by their paths in the folder of a test."""
    models = [
        {
            "model": str(tmp_path / model),
            "parameters": {
                "metric": metric if metric == "identity" else str(tmp_path / metric),
                "weight": 1 + index,
            },
        }
        for index, (model, metric) in enumerate(metrics.items())
    ]
    config = {"merge_method": "fisher", "models": models, "dtype": "float32"}
    return config | settings


class Folder:
    """A metric, read by hand."""

    def __init__(self, path):
        self.about = json.loads(Path(path, "metric.json").read_text())
        self.tensors = weights_of(path)

    def of(self, name, shape):
        """The metric of a tensor of the checkpoint, for `fisher_mean`."""
        entry = self.about["grams"].get(name)
        if entry is not None:
            return InputGram(
                *(self.tensors.get(f"{entry}.input_gram{part}") for part in ("", "_factor")),
                self.tensors.get(f"{entry}.input_gram_diagonal"),
            )
        if name in self.about["ones"]:
            return None
        return self.tensors[name].expand(shape)


def merged_by_hand(models, folders, name, *, turned=False):
    tensors = [model[name].float() for model in models]
    metrics = [Folder(folder).of(name, tensors[0].shape) for folder in folders]
    turn = torch.t if turned and isinstance(metrics[0], InputGram) else torch.Tensor.contiguous
    return turn(fisher_mean([turn(tensor) for tensor in tensors], metrics, [1, 2]))


@pytest.fixture
def two_llamas(run_fisher, text_model, tmp_path):
    """Metrics of two models, in the folders first and second."""
    llama(tmp_path / "other", 1)
    measured(run_fisher, "model", "first")
    measured(run_fisher, "other", "second")
    return {"model": "first", "other": "second"}


def test_what_a_folder_holds(run_fisher, two_llamas, tmp_path):
    about = json.loads(Path("first", "metric.json").read_text())
    assert (about["schema"], about["kind"]) == ("mergekit-karcher/metric/1", "activations")
    assert (about["model"], about["data"]) == ("model", "text.txt")
    assert (about["examples"], about["tokens"]) == (25, 400)
    tensors = weights_of("first")
    attention = "model.layers.1.self_attn.{}_proj.weight"
    assert about["grams"][attention.format("v")] == attention.format("q")
    assert f"{attention.format('q')}.input_gram" in tensors
    assert f"{attention.format('v')}.input_gram" not in tensors
    weights = weights_of("model")
    linear = {n for n, t in weights.items() if t.ndim > 1 and "embed" not in n}
    assert about["grams"].keys() == linear
    assert linear.isdisjoint(tensors)
    assert tensors["model.embed_tokens.weight"].shape == (63, 1)
    assert tensors["model.norm.weight"].shape == (32,)
    assert about["ones"] == []
    assert about["unused"] == {}
    assert not Path("first", "partial.json").exists()


def test_a_merge_is_the_mean_in_these_metrics(two_llamas, tmp_path, merge):
    weights = merge(fisher_config(tmp_path, two_llamas)).weights
    models = [weights_of(tmp_path / name) for name in two_llamas]
    assert weights.keys() == models[0].keys()
    for name, tensor in weights.items():
        expected = merged_by_hand(models, two_llamas.values(), name)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)
    name = "model.layers.0.mlp.down_proj.weight"
    linear = (models[0][name].float() + 2 * models[1][name].float()) / 3
    assert (weights[name] - linear).norm() > 0.01 * linear.norm()


def test_wide_grams_are_stored_in_factors_and_merge(
    run_fisher, text_model, tmp_path, merge, monkeypatch
):
    """Layers of 48 inputs and more, at full rank: the same merge as with dense ones."""
    llama(tmp_path / "other", 1)
    two = {"model": "first", "other": "second"}
    for model, metric in two.items():
        measured(run_fisher, model, f"dense-{metric}")
    monkeypatch.setattr(low_rank, "DENSE_WIDTH", 32)
    monkeypatch.setattr(low_rank, "SHARE_OF_RANK", 1)
    for model, metric in two.items():
        measured(run_fisher, model, metric)
    name = "model.layers.0.mlp.down_proj.weight"
    assert f"{name}.input_gram" not in weights_of("first")
    assert weights_of("first")[f"{name}.input_gram_factor"].shape == (48, 48)
    weights = merge(fisher_config(tmp_path, two)).weights
    dense = {model: f"dense-{metric}" for model, metric in two.items()}
    expected = merge(fisher_config(tmp_path, dense), name="dense").weights
    torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-5)
    models = [weights_of(tmp_path / name) for name in two]
    torch.testing.assert_close(weights[name], merged_by_hand(models, two.values(), name))
    monkeypatch.setattr(low_rank, "SHARE_OF_RANK", 4)
    measured(run_fisher, "model", "quarter")
    assert weights_of("quarter")[f"{name}.input_gram_factor"].shape == (12, 48)


def test_gpt2_whose_weights_are_turned(run_fisher, text_model, tmp_path, merge):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=63, n_positions=16)
    put_beside(text_model, GPT2LMHeadModel(config), "gpt2")
    file = Path("gpt2", "model.safetensors")
    short = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    save_file(short, file, {"format": "pt"})
    other_than("gpt2", "other")
    two = {"gpt2": "first", "other": "second"}
    for model, metric in two.items():
        measured(run_fisher, model, metric)
    about = json.loads(Path("first", "metric.json").read_text())
    assert set(about["ones"]) == {n for n in short if n.endswith("bias")}
    assert weights_of("first")["wpe.weight"].flatten().tolist() == [1 / 16] * 16
    weights = merge(fisher_config(tmp_path, two)).weights
    models = [weights_of(tmp_path / name) for name in two]
    for name, tensor in weights.items():
        stored = name if name in short else name.removeprefix("transformer.")
        expected = merged_by_hand(models, two.values(), stored, turned=True)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)


def test_a_tied_head_and_embedding_are_merged_by_how_often_tokens_occur(
    run_fisher, text_model, tmp_path, merge
):
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    put_beside(text_model, network, "tied")
    other_than("tied", "other")
    measured(run_fisher, "tied", "first")
    records("few.jsonl", [{"text": "w1 w2 w3 w4 w1"}])
    result = run_fisher("other", *KIND, "--data", "few.jsonl", "--quiet", "--out", "second")
    assert result.exit_code == 0, result.output
    two = {"tied": "first", "other": "second"}
    assert not any("lm_head" in name for name in Folder("first").about["grams"])
    weights = merge(fisher_config(tmp_path, two)).weights
    models = [weights_of(tmp_path / name) for name in two]
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(weights[name], merged_by_hand(models, two.values(), name))
    counts = [Folder(folder).tensors[name][:, 0] for folder in two.values()]
    assert counts[1].nonzero().flatten().tolist() == [4, 5, 6, 7]
    # A token that only the first model's data has is the first model's.
    torch.testing.assert_close(weights[name][20], models[0][name][20], rtol=1e-4, atol=1e-5)


@pytest.fixture
def two_mixtures(run_fisher, text_model, tmp_path):
    put_beside(text_model, small_model("mixture"), "mixture")
    other_than("mixture", "other")
    two = {"mixture": "first", "other": "second"}
    for model, metric in two.items():
        measured(run_fisher, model, metric)
    return two


def test_experts_have_the_grams_of_their_own_tokens(two_mixtures, tmp_path, merge):
    first = Folder("first")
    expert = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"
    for index in range(4):
        assert first.about["grams"][expert.format(index, "w3")] == expert.format(index, "w1")
    # Each token goes to two experts; its router and its experts see the same.
    router = first.tensors["model.layers.0.block_sparse_moe.gate.weight.input_gram"]
    of_experts = [first.tensors[f"{expert.format(i, 'w1')}.input_gram"] for i in range(4)]
    torch.testing.assert_close(sum(of_experts), 2 * router)
    weights = merge(fisher_config(tmp_path, two_mixtures)).weights
    models = [weights_of(tmp_path / name) for name in two_mixtures]
    parts = {
        "down_proj": ["w2"],
        "gate_up_proj": ["w1", "w3"],
    }
    for target, names in parts.items():
        tensor = weights[f"model.layers.0.mlp.experts.{target}"]
        for index in range(4):
            by_hand = [
                merged_by_hand(models, two_mixtures.values(), expert.format(index, name))
                for name in names
            ]
            torch.testing.assert_close(tensor[index], torch.cat(by_hand), rtol=1e-4, atol=1e-6)


def test_an_expert_that_no_token_reached_has_no_weight(two_mixtures, tmp_path, merge):
    expert = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    for path in Path("first").glob("*.safetensors"):
        tensors = load_file(path)
        if tensors.pop(f"{expert}.input_gram", None) is not None:
            save_file(tensors, path)
    index = json.loads(Path("first", "model.safetensors.index.json").read_text())
    del index["weight_map"][f"{expert}.input_gram"]
    Path("first", "model.safetensors.index.json").write_text(json.dumps(index))
    about = Folder("first").about
    del about["grams"][expert]
    about["unused"] = {expert: 24}
    Path("first", "metric.json").write_text(json.dumps(about))
    weights = merge(fisher_config(tmp_path, two_mixtures)).weights
    other = weights_of("other")[expert]
    torch.testing.assert_close(weights["model.layers.0.mlp.experts.down_proj"][2], other)


def test_parts_of_one_tensor_that_do_not_share_a_gram(two_mixtures, tmp_path, merge):
    about = Folder("first").about
    expert = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"
    about["grams"][expert.format(0, "w3")] = expert.format(1, "w1")
    Path("first", "metric.json").write_text(json.dumps(about))
    result = merge(fisher_config(tmp_path, two_mixtures))
    assert_error(result, "experts.gate_up_proj", "do not share a metric", "make it anew")


def test_metrics_of_two_kinds_are_not_mixed(two_llamas, run_fisher, tmp_path, merge):
    result = run_fisher("other", *TEXT, "--out", "diagonal")
    assert result.exit_code == 0, result.output
    for metric in ("diagonal", "identity"):
        result = merge(fisher_config(tmp_path, {"model": "first", "other": metric}))
        words = ("has a metric of activations for", f"{tmp_path}/model", metric, "of one kind")
        assert_error(result, *words)


def test_regmean_is_the_same_mean_and_takes_nothing_else(two_llamas, run_fisher, tmp_path, merge):
    config = fisher_config(tmp_path, two_llamas)
    expected = merge(config).weights
    found = merge(config | {"merge_method": "regmean"})
    assert "regmean merged: " in found.output
    assert found.weights.keys() == expected.keys()
    assert all(torch.equal(found.weights[name], expected[name]) for name in expected)
    assert run_fisher("other", *TEXT, "--out", "diagonal").exit_code == 0
    for metrics in (
        {"model": "first", "other": "identity"},
        {"model": "first", "other": "diagonal"},
    ):
        config = fisher_config(tmp_path, metrics, merge_method="regmean")
        assert_error(merge(config, name="refused"), "regmean takes metrics from activations only")
    config = fisher_config(tmp_path, {"model": "first", "other": "second"})
    for model in config["models"]:
        model["parameters"]["metric"] = "self"
    config |= {"merge_method": "regmean", "base_model": str(tmp_path / "model")}
    assert_error(merge(config, name="refused"), "metric: self is for merge_method: fisher; regmean")


def test_karcher_has_no_use_for_them(two_llamas, tmp_path, merge):
    result = merge(fisher_config(tmp_path, two_llamas, merge_method="karcher"))
    assert_error(result, "of activations, which karcher has no use for", "merge_method: fisher")


def test_a_metric_of_another_version_or_model(two_llamas, run_fisher, tmp_path, merge):
    about = Folder("first").about
    Path("first", "metric.json").write_text(json.dumps({**about, "schema": "other/2"}))
    assert_error(merge(fisher_config(tmp_path, two_llamas)), "has schema other/2", "make it anew")
    del about["grams"]["model.layers.0.mlp.up_proj.weight"]
    Path("first", "metric.json").write_text(json.dumps(about))
    result = merge(fisher_config(tmp_path, two_llamas))
    assert_error(result, "has no model.layers.0.mlp.up_proj.weight", "make it anew")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--true",), "--kind activations takes --data"),
        (("--data", "nowhere.txt"), "There is no file nowhere.txt"),
        (("--out", "full"), "full exists: name a new folder"),
    ],
)
def test_mistakes_of_the_command(run_fisher, text_model, tmp_path, arguments, words):
    Path("full").mkdir()
    Path("full", "something").write_text("")
    result = run_fisher("model", *KIND, *TEXT, "--out", "metric", *arguments)
    assert result.exit_code != 0
    assert words in result.output
    assert not Path("metric").exists()


def test_a_checkpoint_that_lacks_a_weight(run_fisher, text_model, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = weights_of("model")
    for path in Path("model").glob("model*.safetensors*"):
        path.unlink()
    without = {n: t for n, t in tensors.items() if n != name}
    save_file(without, Path("model", "model.safetensors"), {"format": "pt"})
    result = run_fisher("model", *KIND, *TEXT, "--out", "metric")
    assert f"model lacks {name} of a LlamaForCausalLM" in result.output
    save_file({**tensors, name: torch.zeros(2, 2)}, Path("model", "model.safetensors"))
    result = run_fisher("model", *KIND, *TEXT, "--out", "other")
    assert f"{name} of model has not the shape that its config says" in result.output
