"""Checkpoints as people publish them: quantised, with buffers, in layouts of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from configs import config_for
from conftest import assert_error, llama, weights_of
from inputs import mean_of
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
MAKE = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    ),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SMALL, intermediate_size=24, max_position_embeddings=32)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, intermediate_size=24, num_key_value_heads=2, num_local_experts=4)
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
        )
    ),
}


@pytest.fixture
def pair(tmp_path):
    """Two models of a family, as paths; extra: tensors to put into both of their files."""

    def make(family, extra=None, dtype=torch.float32):
        paths = []
        for seed in range(2):
            torch.manual_seed(seed)
            folder = tmp_path / f"{family}{seed}{'-extra' if extra else ''}"
            MAKE[family]().to(dtype).save_pretrained(folder)
            if extra:
                change(folder, lambda tensors: tensors | extra)
            paths.append(str(folder))
        return paths

    return make


def change(folder, make):
    file = Path(folder) / "model.safetensors"
    save_file(make(load_file(file)), file, metadata={"format": "pt"})


# Tensors that mergekit does not plan.


def test_a_result_that_would_lack_tensors_stops(pair, merge, cli):
    paths = pair("vit")
    words = ["lacks 32 tensors that every model has", "81 %", "vit.encoder", "left_out: drop"]
    assert_error(merge(config_for(paths)), *words)
    assert_error(cli("report", config=config_for(paths)), *words)


def test_unless_the_config_says_so(pair, merge, cli):
    config = config_for(pair("vit"))
    config["parameters"]["left_out"] = "drop"
    assert 0 < len(merge(config).weights) < 10
    assert cli("report", config=config).exit_code == 0


def test_other_methods_are_not_stopped_but_warned_of(pair, merge, cli, caplog):
    config = config_for(pair("vit"), [1, 1]) | {"merge_method": "linear", "parameters": {}}
    assert merge(config).weights
    assert cli("report", config=config).exit_code == 0
    assert "lacks 32 tensors" in caplog.text


def test_layers_that_a_config_leaves_out_are_no_loss(three_models, merge):
    sources = [{"model": model, "layer_range": [0, 2]} for model in three_models]
    config = {"merge_method": "karcher", "dtype": "float32", "slices": [{"sources": sources}]}
    weights = merge(config).weights
    assert "model.layers.1.mlp.up_proj.weight" in weights
    assert "model.layers.2.mlp.up_proj.weight" not in weights


def test_a_tensor_of_one_model_alone_is_no_loss(three_models, merge, tmp_path):
    other = shutil.copytree(three_models[0], tmp_path / "other")
    save_file({"extra.weight": torch.rand(3)}, other / "extra.safetensors")
    index = json.loads((other / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra.weight"] = "extra.safetensors"
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    assert merge(config_for([str(other), three_models[1]])).weights


def test_what_is_left_out_on_purpose_is_said_at_the_end(pair, merge):
    config = config_for(pair("vit"))
    config["parameters"]["left_out"] = "drop"
    assert "\n  The result lacks 32 tensors that every model has" in merge(config).output


# What is missing, or does not fit.


def test_masks_that_transformers_saves_no_longer_are_not_missed(pair, merge, cli):
    """mergekit asks for the buffers of GPT-NeoX, which its checkpoints have not had since 2023."""
    paths = pair("neox")
    outcome = merge(config_for(paths))
    assert outcome.weights.keys() == weights_of(paths[0]).keys()
    _, info = GPTNeoXForCausalLM.from_pretrained(outcome.out, output_loading_info=True)
    assert not info["missing_keys"]
    assert cli("report", config=config_for(paths)).exit_code == 0


def test_a_tensor_that_one_model_lacks(three_models, merge, cli, tmp_path):
    other = Path(shutil.copytree(three_models[0], tmp_path / "other"))
    name = "model.layers.1.mlp.up_proj.weight"
    index = json.loads((other / "model.safetensors.index.json").read_text())
    file = other / index["weight_map"].pop(name)
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    config = config_for([three_models[1], str(other)])
    for result in (merge(config), cli("report", config=config)):
        assert_error(result, f"{other} has no {name}", "save it anew")


def test_a_tensor_that_all_models_lack_and_need(three_models, merge, cli, tmp_path):
    """Dropped without a word, it would be missing from the result."""
    paths = []
    for path in three_models[:2]:
        paths.append(str(tmp_path / Path(path).name))
        shutil.copytree(path, paths[-1])
        without = {n: t for n, t in weights_of(path).items() if n != "model.norm.weight"}
        for file in Path(paths[-1]).glob("*.safetensors*"):
            file.unlink()
        save_file(without, Path(paths[-1]) / "model.safetensors", metadata={"format": "pt"})
    for result in (merge(config_for(paths)), cli("report", config=config_for(paths))):
        assert_error(result, "what no model has (model.norm.weight)", "architectures")


def test_files_of_another_architecture_than_their_config_says(pair, three_models, merge):
    for path in (paths := pair("gpt2")):
        shutil.copy(Path(three_models[0]) / "config.json", path)
    assert_error(merge(config_for(paths)), "None of the", "check that architectures in its config")


def test_layers_beyond_the_last(three_models, merge):
    sources = [{"model": model, "layer_range": [2, 4]} for model in three_models]
    config = {"merge_method": "karcher", "dtype": "float32", "slices": [{"sources": sources}]}
    assert_error(merge(config), "what no model has", "check layer_range")


def test_unequal_sizes_are_named(three_models, merge, cli, tmp_path):
    wide = llama(tmp_path / "wide", 5, extra_words=4)
    config = config_for([three_models[0], wide])
    words = [
        "model.embed_tokens.weight is [63, 32] in",
        "[67, 32] in",
        "tokenizer: {source: union}",
    ]
    assert_error(merge(config), *words)
    config["tokenizer"] = {"source": "union"}
    assert merge(config).weights
    assert "67, 32" in cli("report", config=config_for([three_models[0], wide])).output


def test_a_report_names_all_that_would_stop_the_merge(cli, tmp_path):
    """Two faults of raw checkpoints: unequal sizes, and whole numbers that differ."""
    paths = []
    for seed in (0, 1):
        paths.append(str(tmp_path / f"{seed}.safetensors"))
        tensors = {"a": torch.rand(3 + seed), "bn.num_batches_tracked": torch.tensor(5 + seed)}
        save_file(tensors, paths[-1])
    result = cli("report", config=config_for(paths))
    assert result.exit_code == 1
    assert "2 things would stop this merge" in result.output
    assert "a is [3] in" in result.output
    assert "num_batches_tracked holds whole numbers, of which there is no mean" in result.output
    assert "mergekit-karcher align" in result.output


# Buffers among the weights.

LENGTH = 32
MASK = torch.tril(torch.ones(1, 1, LENGTH, LENGTH))


def neox_buffers(dtype):
    buffers = {}
    for layer in range(2):
        at = f"gpt_neox.layers.{layer}.attention."
        buffers[at + "bias"] = MASK.bool()
        buffers[at + "masked_bias"] = torch.tensor(-1e9).to(dtype)
        buffers[at + "rotary_emb.inv_freq"] = torch.tensor([1.0, 0.1]).to(dtype)
    return buffers


@pytest.mark.parametrize("granularity", ["tensor", "row", "model"])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("float16", "float16"), ("float16", "bfloat16"), ("float32", "float16")]
)
def test_gpt_neox_as_it_is_published(pair, merge, cli, granularity, stored, dtype):
    """masked_bias is -inf in float16, and the mask holds truth values."""
    paths = pair("neox", dtype=getattr(torch, stored))
    plain = merge(config_for(paths, granularity=granularity) | {"dtype": dtype}, name="plain")
    paths = pair("neox", neox_buffers(getattr(torch, stored)), dtype=getattr(torch, stored))
    config = config_for(paths, granularity=granularity) | {"dtype": dtype}
    weights = merge(config).weights
    attention = "gpt_neox.layers.1.attention."
    assert torch.equal(weights[attention + "bias"], MASK.bool())
    expected = torch.tensor(-1e9).to(getattr(torch, stored)).to(getattr(torch, dtype))
    assert torch.equal(weights[attention + "masked_bias"], expected)
    for name, tensor in plain.weights.items():
        assert torch.equal(weights[name], tensor), name
    report = cli("report", "--json", config=config)
    assert report.exit_code == 0, report.output
    assert "masked_bias" not in report.output


def test_a_causal_mask_counts_nowhere(pair, merge, cli):
    """GPT-2's masks, 32 x 32 ones, would outweigh these small weights."""
    paths = pair("gpt2")
    config = config_for(paths, granularity="model")
    plain = merge(config, name="plain")
    before = json.loads(cli("report", "--json", config=config).stdout)
    masks = {f"transformer.h.{layer}.attn.bias": MASK.clone() for layer in range(2)}
    config = config_for(pair("gpt2", masks), granularity="model")
    with_masks = merge(config)
    for name, tensor in plain.weights.items():
        assert torch.equal(with_masks.weights[name], tensor), name
    after = json.loads(cli("report", "--json", config=config).stdout)
    assert before["whole"] is not None
    assert after["whole"] == before["whole"]


def test_whole_numbers_are_not_rounded(merge, tmp_path):
    """As bfloat16, position 1001 would be 1000."""
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(llama(tmp_path / str(seed), seed))
    positions = torch.arange(1001)
    raw = [str(tmp_path / f"{seed}.safetensors") for seed in range(2)]
    for file in raw:
        save_file({"w": torch.rand(3), "position_ids": positions}, file)
    config = config_for(raw) | {"dtype": "bfloat16", "out_dtype": "bfloat16"}
    weights = merge(config, command="mergekit-pytorch").weights
    assert torch.equal(weights["position_ids"], positions)
    assert weights["w"].dtype is torch.bfloat16


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_equal_values_that_are_not_finite_are_copied_unless_they_are_weights(
    merge, tmp_path, value
):
    """A table of a network may hold infinity; a weight may not."""
    files = [str(tmp_path / f"{seed}.safetensors") for seed in range(3)]
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        save_file({"w": torch.rand(3), "alibi": torch.tensor([1.0, value])}, file)
    weights = merge(config_for(files), command="mergekit-pytorch").weights
    torch.testing.assert_close(
        weights["alibi"], torch.tensor([1.0, value]), rtol=0, atol=0, equal_nan=True
    )
    other = str(tmp_path / "other.safetensors")
    save_file({"w": torch.rand(3), "alibi": torch.tensor([2.0, value])}, other)
    outcome = merge(config_for([files[0], other]), command="mergekit-pytorch", name="unequal")
    assert_error(outcome, "alibi", "not finite")
    parameters = str(tmp_path / "parameters.safetensors")
    save_file({"w.weight": torch.tensor([1.0, value])}, parameters)
    outcome = merge(config_for([parameters]), command="mergekit-pytorch", name="of-weights")
    assert_error(outcome, "w.weight", "not finite")


def test_a_cast_that_overflows_is_said_to_be_the_cast(three_models, merge, tmp_path):
    other = Path(shutil.copytree(three_models[0], tmp_path / "other"))
    name = "model.layers.1.mlp.up_proj.weight"
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][0, 0] = 1e5
            save_file(tensors, file, metadata={"format": "pt"})
    config = config_for([str(other), three_models[1]]) | {"dtype": "float16"}
    assert_error(merge(config), name, str(other), "dtype: float16", "take dtype: bfloat16")


# Rows.


def by_output_unit(tensors):
    """Each row of each matrix by itself, by the slow reference."""
    rows = zip(*tensors, strict=True)
    return torch.stack([mean_of(list(of_unit)) for of_unit in rows])


def test_rows_of_gpt2_are_output_units(pair, merge):
    """Its linear layers are stored as (in, out), its embeddings as (token, hidden)."""
    paths = pair("gpt2")
    merged = merge(config_for(paths, granularity="row")).weights
    inputs = [weights_of(path) for path in paths]
    for name in merged:
        tensors = [tensors[name].double() for tensors in inputs]
        if tensors[0].ndim == 2:
            turned = [t.T for t in tensors] if ".c_" in name else tensors
            expected = by_output_unit(turned)
            expected = expected.T if ".c_" in name else expected
            torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", [None, "identity"])
def test_rows_of_fused_experts_are_output_units(pair, merge, metric):
    paths = pair("mixtral")
    metrics = [metric] * 2 if metric else None
    outcome = merge(config_for(paths, granularity="row", metrics=metrics))
    models = [MixtralForCausalLM.from_pretrained(path) for path in (*paths, outcome.out)]
    for name in ("gate_up_proj", "down_proj"):
        first, second, merged = (
            getattr(model.model.layers[1].mlp.experts, name).detach().double() for model in models
        )
        for expert in range(4):
            expected = by_output_unit([first[expert], second[expert]])
            torch.testing.assert_close(merged[expert], expected, rtol=1e-5, atol=1e-7)


def test_rows_around_a_base_of_gpt2(pair, merge):
    first, second = pair("gpt2")
    base = str(Path(shutil.copytree(first, Path(first).parent / "base")))
    change(base, lambda tensors: {name: t / 2 for name, t in tensors.items()})
    config = config_for([first, second], base=base, granularity="row", origin="base")
    merged = merge(config).weights
    name = "transformer.h.1.mlp.c_fc.weight"
    start = weights_of(base)[name].double().T
    around = [weights_of(path)[name].double().T - start for path in (first, second)]
    expected = (start + by_output_unit(around)).T
    torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-7)
