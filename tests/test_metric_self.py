"""`metric: self`: every architecture layer by layer, its limits, and what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, write
from configs import config_for
from conftest import assert_error, llama, weights_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

WEIGHTS = [1.0, 2.0, 3.0]

# Those that mergekit 0.1.5 cannot plan whole.
UNPLANNED = {"deepseek_v3", "vit", "whisper", "bert (masked language model)", "clip", "bert"}


def self_config(models, base, weights=None, **settings):
    ridge = {"ridge": settings.pop("ridge")} if "ridge" in settings else {}
    config = config_for(models, weights, base, **settings)
    config["parameters"] |= {"metric": "self"} | ridge
    return config | {"merge_method": "fisher"}


def solved(layers, base, weights, ridge=0.3):
    """The mean of layers (out, in), from the normal equations as they are written."""
    layers, base = [layer.double().numpy() for layer in layers], base.double().numpy()
    changes = [layer - base for layer in layers]
    if not any(change.any() for change in changes):
        return torch.as_tensor(base)
    metrics = [w * c.T @ c / (c**2).sum() for w, c in zip(weights, changes, strict=True)]
    mean = np.tensordot(weights, layers, 1) / np.sum(weights)
    pull = sum((layer - mean) @ metric for layer, metric in zip(layers, metrics, strict=True))
    summed = sum(metrics)
    summed += ridge * np.diag(summed).mean() * np.eye(len(summed))
    return torch.as_tensor(mean + np.linalg.solve(summed, pull.T).T)


def linear(tensors, weights):
    return sum(w * t.double() for w, t in zip(weights, tensors, strict=True)) / sum(weights)


def expected_of(module, name, tensors, base, *, is_tied):
    """The mean of a parameter of a network, by the kind of its module."""
    if is_tied:
        return linear(tensors, WEIGHTS)
    if isinstance(module, Conv1D) and name == "weight":
        return solved([t.T for t in tensors], base.T, WEIGHTS).T
    if isinstance(module, nn.Embedding) or getattr(module, "groups", 1) > 1 or base.ndim < 2:
        return linear(tensors, WEIGHTS)
    if "Experts" in type(module).__name__:
        parts = zip(zip(*tensors, strict=True), base, strict=True)
        return torch.stack([solved(layers, around, WEIGHTS) for layers, around in parts])
    if name != "weight":
        return linear(tensors, WEIGHTS)
    flat = [tensor.flatten(1) for tensor in tensors]
    return solved(flat, base.flatten(1), WEIGHTS).view(base.shape)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - UNPLANNED))
def test_each_parameter_by_the_kind_of_its_module(architecture, merge, tmp_path):
    base, *paths = (
        write(architecture, tmp_path / str(seed), seed, torch.float32) for seed in range(4)
    )
    merged = merge(self_config(paths, base, WEIGHTS))
    assert merged.weights
    kind, _ = ARCHITECTURES[architecture]
    network, around, *inputs = (
        kind.from_pretrained(path, dtype=torch.float32) for path in (merged.out, base, *paths)
    )
    compared = 0
    tables = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            tensors = [one.get_submodule(path).get_parameter(name) for one in (around, *inputs)]
            start, *others = (tensor.detach() for tensor in tensors)
            expected = expected_of(module, name, others, start, is_tied=id(parameter) in tables)
            error = (parameter.detach().double() - expected).norm()
            assert error <= 1e-6 * expected.norm() + 1e-12, f"{path}.{name}"
            compared += 1
    assert compared > 10


@pytest.fixture
def tuned(tmp_path):
    """Makes a base and three fine-tunes of it; options: those of the config of a Llama."""

    def make(dtype=torch.float32, **options):
        base = llama(tmp_path / "base", 0, dtype=dtype, **options)
        paths = []
        for seed in (1, 2, 3):
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.003 * torch.randn(parameter.shape, generator=generator)
            paths.append(str(shutil.copytree(base, tmp_path / f"m{seed}")))
            for file in Path(paths[-1]).glob("*.safetensors*"):
                file.unlink()
            model.save_pretrained(paths[-1])
        return base, paths

    return make


def assert_close(merged, expected):
    assert (merged.double() - expected).norm() <= 1e-6 * expected.norm()


LAYER, EMBEDDING, HEAD = (
    "model.layers.1.mlp.down_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)


def test_the_base_takes_no_part_wherever_it_stands(tuned, merge):
    base, paths = tuned()
    expected = merge(self_config(paths, base, WEIGHTS), name="a").weights
    for index, config in enumerate(
        [
            self_config([base, *paths], base, [7, *WEIGHTS]),
            self_config(paths, base, WEIGHTS, origin="base"),
        ]
    ):
        weights = merge(config, name=f"b{index}").weights
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_ridge_draws_to_the_linear_mean(tuned, merge):
    base, paths = tuned()
    tensors, around = [weights_of(path) for path in paths], weights_of(base)
    layers = [t[LAYER] for t in tensors]
    for ridge in (0.01, 0.3):
        merged = merge(self_config(paths, base, WEIGHTS, ridge=ridge), name=f"{ridge}").weights
        assert_close(merged[LAYER], solved(layers, around[LAYER], WEIGHTS, ridge))
    far = merge(self_config(paths, base, WEIGHTS, ridge=1e9), name="far").weights
    assert_close(far[LAYER], linear(layers, WEIGHTS))


def test_a_tied_head_is_an_embedding(tuned, merge):
    base, paths = tuned(tie_word_embeddings=True)
    merged = merge(self_config(paths, base)).weights
    assert HEAD not in merged
    assert_close(merged[EMBEDDING], linear([weights_of(p)[EMBEDDING] for p in paths], [1, 1, 1]))


def test_filters_choose_the_layers(tuned, merge):
    base, paths = tuned()
    config = self_config(paths, base)
    config["parameters"]["metric"] = [
        {"filter": "mlp", "value": "self"},
        {"value": "identity"},
    ]
    merged, tensors = merge(config).weights, [weights_of(path) for path in paths]
    around, query = weights_of(base), "model.layers.0.self_attn.q_proj.weight"
    assert_close(merged[query], linear([t[query] for t in tensors], [1, 1, 1]))
    assert_close(merged[LAYER], solved([t[LAYER] for t in tensors], around[LAYER], [1, 1, 1]))


def test_slices_and_files(tuned, merge, tmp_path):
    base, paths = tuned()
    sources = [{"model": model, "layer_range": [1, 3]} for model in (base, *paths)]
    config = self_config(paths, base) | {"slices": [{"sources": sources}]}
    del config["models"]
    tensors, around = [weights_of(path) for path in paths], weights_of(base)
    expected = solved([t[LAYER] for t in tensors], around[LAYER], [1, 1, 1])
    assert_close(merge(config).weights[LAYER.replace("1", "0")], expected)
    files = []
    for index, content in enumerate((around, *tensors)):
        files.append(str(tmp_path / f"{index}.safetensors"))
        save_file(content, files[-1])
    config = self_config(files[1:], files[0])
    raw = merge(config, command="mergekit-pytorch", name="raw").weights
    assert_close(raw[LAYER], expected)
    assert_close(raw[EMBEDDING], linear([t[EMBEDDING] for t in tensors], [1, 1, 1]))


def test_adapters_are_fine_tunes(tuned, merge, tmp_path):
    base, _ = tuned()
    models, inputs = [], []
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj", "q_proj"]))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / f"adapter{seed}")
        models.append(f"{base}+{tmp_path / f'adapter{seed}'}")
        inputs.append(model.merge_and_unload().state_dict()[LAYER])
    cache = tmp_path / "loras"
    merged = merge(self_config(models, base), "--lora-merge-cache", str(cache)).weights
    around = weights_of(base)[LAYER]
    error = (merged[LAYER].double() - solved(inputs, around, [1, 1])).norm()
    # The adapters are merged into the base by mergekit, in the dtype of its choice.
    assert error < 2e-3 * (merged[LAYER] - around).norm()


def test_another_vocabulary_gets_the_linear_mean_and_is_named(tuned, merge, tmp_path):
    base, paths = tuned()
    wide = llama(tmp_path / "wide", 5, extra_words=4, dtype=torch.float32)
    config = self_config([paths[0], wide], base) | {"tokenizer": {"source": "union"}}
    outcome = merge(config)
    assert len(outcome.weights[HEAD]) == 67
    first, second = weights_of(paths[0]), weights_of(wide)
    for name in (HEAD, EMBEDDING):
        expected = linear([first[name], second[name][:63]], [1, 1])
        assert_close(outcome.weights[name][:63], expected)
        assert f"{name}" in outcome.output.split("other vocabularies, merged by the linear mean")[1]
    assert_close(
        outcome.weights[LAYER],
        solved([first[LAYER], second[LAYER]], weights_of(base)[LAYER], [1, 1]),
    )


def test_the_summary_says_what_was_done(tuned, merge):
    base, paths = tuned()
    output = merge(self_config(paths, base, WEIGHTS)).output
    assert "30 tensors merged, 22 of them in the metrics of their changes" in output
    assert "metric: self, ridge: 0.3" in output
    assert "weights: m1 0.167, m2 0.333, m3 0.5; base: base" in output
    assert "as far from the base as unrelated models" not in output


def test_models_of_another_base_are_named(three_models, merge):
    base, *paths = three_models
    output = merge(self_config(paths, base)).output
    assert f"{paths[0]} is as far from the base as unrelated models are" in output
    assert "1.4 times as long" in output


def test_what_the_base_lacks_gets_the_linear_mean_and_is_named(merge, tmp_path):
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        tensors = {"0.weight": torch.rand(4, 5), "1.weight": torch.rand(3, 4)}
        if seed == 0:
            del tensors["1.weight"]
        paths.append(str(tmp_path / f"{seed}.safetensors"))
        save_file(tensors, paths[-1])
    config = self_config(paths[1:], paths[0])
    outcome = merge(config, "--tensor-union", command="mergekit-pytorch")
    assert "not in the base, merged by the linear mean: 1.weight" in outcome.output
    inputs = [load_file(path)["1.weight"] for path in paths[1:]]
    assert_close(outcome.weights["1.weight"], linear(inputs, [1, 1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_are_rounded_once(tuned, merge, dtype):
    base, paths = tuned(getattr(torch, dtype))
    merged = merge(self_config(paths, base) | {"dtype": dtype}).weights[LAYER]
    tensors = [weights_of(path)[LAYER] for path in paths]
    expected = solved(tensors, weights_of(base)[LAYER], [1, 1, 1])
    assert torch.equal(merged, expected.to(merged.dtype))


def test_mistakes(tuned, merge, cli):
    base, paths = tuned()
    without = self_config(paths, None)
    assert_error(merge(without), "metric: self needs the base model's")
    mixed = self_config(paths, base)
    mixed["models"][1]["parameters"]["metric"] = "identity"
    for result in (merge(mixed), cli("report", config=mixed)):
        assert_error(result, f"identity for {paths[1]}", "give all models metric: self")
    karcher = self_config(paths, base) | {"merge_method": "karcher"}
    assert_error(merge(karcher), "metric: self is for merge_method: fisher")
    assert_error(merge(self_config(paths, base, ridge=-1)), "ridge is -1.0: give a finite")


def test_a_report_sees_the_models_around_the_base(tuned, cli):
    base, paths = tuned()
    result = cli("report", "--json", config=self_config(paths, base, WEIGHTS))
    report = json.loads(result.stdout)
    assert report["settings"]["origin"] == ["base"]
    assert [model["is_base"] for model in report["models"]] == [False, False, False, True]
    assert {tensor["origin"] for tensor in report["tensors"]} == {"base"}
