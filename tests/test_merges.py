"""Real merges of real checkpoints by mergekit's own commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from configs import config_for
from conftest import llama, weights_of
from inputs import ambient_mean
from mergekit.merge_methods import get, merge_state_dicts
from mergekit.merge_methods.karcher import karcher_merge_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit_karcher
from mergekit_karcher import karcher_mean


def bf16_config(models, weights=None, **settings):
    return config_for(models, weights, **{"dtype": "bfloat16"} | settings)


def expected_of(models, weights, name):
    tensors = [weights_of(model)[name].double() for model in models]
    flat = [tensor.numpy().ravel() for tensor in tensors]
    return torch.as_tensor(ambient_mean(flat, weights)).reshape(tensors[0].shape)


def assert_merged(outcome, models, weights, names=None):
    """Every tensor is the mean of the models' to within bfloat16's rounding."""
    merged = outcome.weights
    for name in names or merged:
        share = weights(name) if callable(weights) else weights
        expected = expected_of(models, share, name)
        largest = max(weights_of(model)[name].abs().max().item() for model in models)
        torch.testing.assert_close(
            merged[name].double(), expected, rtol=2**-8, atol=2**-9 * largest
        )


def test_three_models_merged_saved_loaded_and_generating(three_models, merge):
    outcome = merge(bf16_config(three_models))
    assert_merged(outcome, three_models, [1, 1, 1])
    assert set(outcome.weights) == set(weights_of(three_models[0]))
    model = AutoModelForCausalLM.from_pretrained(outcome.out)
    tokenizer = AutoTokenizer.from_pretrained(outcome.out)
    prompt = tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**prompt, max_new_tokens=5, min_new_tokens=5).shape[1] >= 8


def test_the_summary_and_the_card_say_what_ran(three_models, merge):
    outcome = merge(bf16_config(three_models))
    line, weights, settings = outcome.output.splitlines()[-3:]
    assert line.startswith(f"karcher merged: {len(outcome.weights)} tensors merged, models ")
    for what in ("not certified unique", "fell back to the linear mean", "not converged"):
        assert f", 0 {what}" in line
    assert weights == "  weights: a 0.333, b 0.333, c 0.333"
    assert settings == "  granularity: tensor, origin: zero, magnitude: arithmetic"
    version = mergekit_karcher.__version__
    assert f"Karcher Mean (mergekit-karcher {version})" in (outcome.out / "README.md").read_text()


def test_quiet_and_python_callers_hear_no_summary(three_models, merge, capsys):
    assert "tensors merged" not in merge(bf16_config(three_models), "--quiet").output
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(
        MergeConfiguration.model_validate(bf16_config(three_models)),
        str(Path(three_models[0]).parent / "by-python"),
        options=MergeOptions(quiet=True),
    )
    assert "tensors merged" not in capsys.readouterr().err


def test_weights_per_model_layer_gradient_and_filter(three_models, merge):
    """A list runs over the layers, a filter picks tensors by name: as everywhere in mergekit."""
    filtered = [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 2}]
    outcome = merge(bf16_config(three_models, [0.5, filtered, "1e-1"]))

    def weights(name):
        if "mlp" not in name:
            return [0.5, 2, 0.1]
        return [0.5, int(name.split(".")[2]) / 2, 0.1]

    assert_merged(outcome, three_models, weights)


def test_a_model_of_weight_zero_may_hold_anything(three_models, merge, tmp_path):
    broken = Path(shutil.copytree(three_models[2], tmp_path / "broken"))
    for path in broken.glob("*.safetensors"):
        tensors = {name: torch.full_like(t, torch.nan) for name, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    models = [*three_models[:2], str(broken)]
    outcome = merge(bf16_config(models, [1, 2, 0]))
    assert_merged(outcome, three_models[:2], [1, 2])


@pytest.mark.parametrize("listed", [True, False])
def test_a_base_model_is_one_more_participant(three_models, merge, listed):
    """As in the built-in, listed among the models or not."""
    models = three_models if listed else three_models[:2]
    outcome = merge(bf16_config(models, base_model=three_models[2]))
    assert_merged(outcome, three_models, [1, 1, 1])


def test_slices_of_different_layers(three_models, merge):
    first, second, _ = three_models
    sources = [{"model": first, "layer_range": [0, 2]}, {"model": second, "layer_range": [1, 3]}]
    outcome = merge(
        {"merge_method": "karcher", "slices": [{"sources": sources}], "dtype": "bfloat16"}
    )
    name = "model.layers.{}.mlp.up_proj.weight"
    for layer in (0, 1):
        pair = [weights_of(first)[name.format(layer)], weights_of(second)[name.format(layer + 1)]]
        expected = ambient_mean([tensor.double().numpy().ravel() for tensor in pair], [1, 1])
        torch.testing.assert_close(
            outcome.weights[name.format(layer)].double().ravel(),
            torch.as_tensor(expected),
            rtol=2**-8,
            atol=2**-9 * pair[0].abs().max().item(),
        )


PUBLISHED = [
    {"parameters": {"tol": "1e-10", "max_iter": 999}, "tokenizer": {"source": "union"}},
    {"parameters": {"tol": "1e-9", "max_iter": 20000}},
    {"parameters": {"max_iter": 9999, "tol": 1e-9}, "tokenizer": {"source": "union"}},
    {"tokenizer": {"source": "union"}, "chat_template": "auto"},
    {"parameters": {"tol": "1e-5", "max_iter": 10}},
]


@pytest.mark.parametrize("settings", PUBLISHED)
def test_published_configurations_run_as_they_stand(three_models, merge, settings):
    """YAML 1.1 reads 1e-5 as a string."""
    outcome = merge(bf16_config(three_models, **settings))
    assert ", 0 not converged." in outcome.output
    assert_merged(outcome, three_models, [1, 1, 1])


def test_modules_with_slices(three_models, merge):
    sources = [{"model": model, "layer_range": [0, 3]} for model in three_models]
    config = bf16_config([], modules={"default": {"slices": [{"sources": sources}]}})
    del config["models"]
    assert_merged(merge(config), three_models, [1, 1, 1])


def test_vocabularies_of_different_sizes_by_tokenizer_union(merge, tmp_path):
    models = [llama(tmp_path / f"v{seed}", seed, extra_words=seed) for seed in range(3)]
    outcome = merge(bf16_config(models, tokenizer={"source": "union"}))
    assert len(outcome.weights["lm_head.weight"]) == 63 + 0 + 1 + 2
    names = [name for name in outcome.weights if "layers" in name]
    assert_merged(outcome, models, [1, 1, 1], names)
    assert len(AutoTokenizer.from_pretrained(outcome.out)) == 66


def test_tied_heads(merge, tmp_path):
    models = [llama(tmp_path / f"t{seed}", seed, tie_word_embeddings=True) for seed in range(2)]
    outcome = merge(bf16_config(models))
    assert_merged(outcome, models, [1, 1])
    AutoModelForCausalLM.from_pretrained(outcome.out)


def test_a_stage_of_mergekit_multi(three_models, merge):
    stages = [
        bf16_config(three_models[:2], [3, 1], name="first"),
        bf16_config(["first", three_models[2]]) | {"merge_method": "karcher_mean"},
    ]
    outcome = merge(stages, command="mergekit-multi")
    first = outcome.out.parent / "stages" / "first"
    assert_merged(outcome, [first, three_models[2]], [1, 1])
    told = [line for line in outcome.output.splitlines() if line.startswith("karcher ")]
    assert [line.split(":")[0] for line in told] == ["karcher first", "karcher merged"]


def test_raw_pytorch_files(merge, tmp_path):
    paths = []
    for seed, suffix in enumerate(("safetensors", "pt", "bin")):
        generator = torch.Generator().manual_seed(seed)
        state = {
            "w": torch.randn(6, 5, generator=generator),
            "b": torch.rand(5, generator=generator),
            "steps": torch.tensor(7),
        }
        paths.append(str(tmp_path / f"m{seed}.{suffix}"))
        if suffix == "safetensors":
            save_file(state, paths[-1])
        else:
            torch.save(state, paths[-1])
    config = bf16_config(paths, [1, 2, 3])
    del config["dtype"]
    outcome = merge(config, command="mergekit-pytorch")
    assert outcome.weights["steps"] == 7
    states = [
        load_file(p) if p.endswith("safetensors") else torch.load(p, weights_only=True)
        for p in paths
    ]
    for name in ("w", "b"):
        expected, _ = karcher_mean([state[name] for state in states], [1, 2, 3])
        assert torch.equal(outcome.weights[name], expected)
    assert "karcher merged: 2 tensors merged" in outcome.output


def test_tensors_that_only_some_models_have_are_merged_and_told(merge, tmp_path):
    """Their weights are renormalised."""
    states = [
        {"w": torch.rand(4), "extra": torch.rand(4)},
        {"w": torch.rand(4)},
        {"extra": torch.rand(4)},
    ]
    states[2]["w"] = torch.rand(4)
    paths = [str(tmp_path / f"m{i}.safetensors") for i in range(3)]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    config = bf16_config(paths, [1, 2, 3]) | {"dtype": "float32"}
    outcome = merge(config, "--tensor-union", command="mergekit-pytorch")
    expected, _ = karcher_mean([states[0]["extra"], states[2]["extra"]], [1, 3])
    assert torch.equal(outcome.weights["extra"], expected)
    assert "missing from some models, merged from those that have them: extra" in outcome.output


def test_fall_backs_are_counted_and_named_but_never_flood(merge, tmp_path):
    names = [f"t{index}" for index in range(9)]
    state = {name: torch.rand(4) for name in names}
    paths = [str(tmp_path / "plus.safetensors"), str(tmp_path / "minus.safetensors")]
    save_file(state, paths[0])
    save_file({name: -tensor for name, tensor in state.items()}, paths[1])
    outcome = merge(bf16_config(paths, [3, 1]) | {"dtype": "float32"}, command="mergekit-pytorch")
    for name in names:
        torch.testing.assert_close(outcome.weights[name], state[name] / 2)
    told = outcome.output[outcome.output.index("karcher merged") :].splitlines()
    assert "9 fell back to the linear mean" in told[0]
    assert "and 4 more" in told[3]
    assert len(told) == 4


def test_the_summary_shows_what_is_in_effect(three_models, merge):
    """Weights that sum to one, as ranges where they differ, and every value of a setting."""
    filtered = [{"filter": "mlp", "value": 3}, {"value": 0}]
    base, *models = three_models
    config = bf16_config(models, [1, filtered]) | {
        "base_model": base,
        "parameters": {
            "origin": "base",
            "granularity": [{"filter": "norm", "value": "tensor"}, {"value": "row"}],
            "magnitude": "linear",
        },
    }
    lines = merge(config).output.splitlines()
    assert "  weights: b 0.25 to 1, c 0 to 0.75; base: a" in lines
    (settings,) = [line for line in lines if line.startswith("  granularity")]
    assert sorted(settings.split(", ")[0].split(": ")[1].split(" and ")) == ["row", "tensor"]
    assert settings.endswith(", origin: base, magnitude: linear")


def test_rows_that_fell_back_are_counted_and_not_their_tensors(merge, tmp_path):
    state = {name: torch.rand(6, 4) for name in ("some", "none")}
    other = {name: tensor + 0.1 for name, tensor in state.items()}
    other["some"][[1, 4]] = -state["some"][[1, 4]]
    paths = [str(tmp_path / f"m{index}.safetensors") for index in range(2)]
    for path, tensors in zip(paths, (state, other), strict=True):
        save_file(tensors, path)
    config = bf16_config(paths) | {"dtype": "float32", "parameters": {"granularity": "row"}}
    outcome = merge(config, command="mergekit-pytorch")
    assert ", 2 rows fell back to the linear mean, 0 not converged." in outcome.output
    assert "  fell back to the linear mean: some (2 of 6 rows)\n" in outcome.output


def test_lora_inputs(three_models, merge, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(three_models[0], dtype=torch.bfloat16)
    adapted = get_peft_model(base, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    outcome = merge(
        bf16_config([f"{three_models[0]}+{tmp_path / 'adapter'}", three_models[1]]),
        "--lora-merge-cache",
        str(tmp_path / "cache"),
    )
    full = adapted.merge_and_unload().state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    expected, _ = karcher_mean([full[name], weights_of(three_models[1])[name]])
    torch.testing.assert_close(outcome.weights[name], expected, rtol=2**-7, atol=1e-4)


def test_float32_work_and_bfloat16_output_round_once(merge, tmp_path):
    models = [llama(tmp_path / f"f{seed}", seed, dtype=torch.float32) for seed in range(3)]
    outcome = merge(bf16_config(models, dtype="float32", out_dtype="bfloat16"))
    for name, tensor in outcome.weights.items():
        exact, _ = karcher_mean([weights_of(model)[name] for model in models])
        assert torch.equal(tensor, exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_builtin_computes_is_the_same_where_it_is_exact(dtype):
    """Equal weights, converged: the built-in's own function, left in place, agrees."""
    tensors = [
        torch.randn(8, 9, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4)
    ]
    theirs = karcher_merge_tensors(tensors, [0.25] * 4, max_iter=500, tol=1e-7)
    ours = merge_state_dicts([{"w": tensor} for tensor in tensors], "karcher")["w"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_both_names_are_the_same_method():
    assert type(get("karcher")) is not type(get("linear"))
    tensors = [{"w": torch.rand(5)} for _ in range(2)]
    first, second = (merge_state_dicts(tensors, name)["w"] for name in ("karcher", "karcher_mean"))
    assert torch.equal(first, second)


def test_a_tiny_tensor_is_merged_not_zeroed():
    """The documented difference: the built-in returns zeros below its tol."""
    tensors = [{"w": torch.full((3,), 1e-7)}, {"w": torch.full((3,), 3e-7)}]
    torch.testing.assert_close(merge_state_dicts(tensors, "karcher")["w"], torch.full((3,), 2e-7))


def spoil(model, folder, name, value):
    """A copy of a model with one value of one tensor replaced."""
    copy = Path(shutil.copytree(model, folder))
    index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    path = copy / index[name]
    tensors = load_file(path)
    tensors[name][1, 2] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return str(copy)


def assert_stopped(outcome, *words):
    """One line that has those words, status 1, no traceback, and nothing that loads."""
    assert outcome.exit_code == 1, outcome.output
    errors = [line for line in outcome.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, outcome.output
    for word in words:
        assert word in errors[0]
    assert "Traceback" not in outcome.output
    assert "tensors merged" not in outcome.output
    assert_nothing_loads(outcome)


def assert_nothing_loads(outcome):
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(outcome.out, local_files_only=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_stops_the_merge(three_models, merge, tmp_path, value):
    name = "model.layers.1.mlp.up_proj.weight"
    broken = spoil(three_models[1], tmp_path / "broken", name, value)
    outcome = merge(bf16_config([three_models[0], broken]))
    assert_stopped(outcome, name, broken, str(value), "[1, 2]", "leave out that model")


def test_an_error_under_slices_names_the_tensor_as_the_model_does(three_models, merge, tmp_path):
    broken = spoil(
        three_models[1], tmp_path / "broken", "model.layers.2.mlp.up_proj.weight", torch.nan
    )
    sources = [
        {"model": three_models[0], "layer_range": [0, 2]},
        {"model": broken, "layer_range": [1, 3]},
    ]
    config = bf16_config([], slices=[{"sources": sources}])
    del config["models"]
    own = "(there model.layers.2.mlp.up_proj.weight)"
    assert_stopped(merge(config), "model.layers.1.mlp.up_proj.weight", f"{broken} {own}")


BAD_SETTINGS = [
    ({"weight": -0.5}, {}, ["weight of {model}", "-0.5", "0 or more", "embed_tokens"]),
    ({"weight": float("nan")}, {}, ["weight of {model}", "nan", "0 or more"]),
    ({"weight": float("inf")}, {}, ["weight of {model}", "inf"]),
    ({"weight": "much"}, {}, ["weight is 'much'", "give a number"]),
    ({"weigth": 0.5}, {}, ["Unknown parameter weigth", "{model}", "did you mean weight?"]),
    ({}, {"tol": 0}, ["tol is 0", "positive"]),
    ({}, {"tol": -1e-9}, ["tol is -1e-09", "positive"]),
    ({}, {"max_iter": 0}, ["max_iter is 0", "1 or more"]),
    ({}, {"max_iter": "many"}, ["max_iter is 'many'"]),
    ({"max_iter": 5}, {}, ["max_iter stands under {model}", "belongs to the whole merge"]),
    ({}, {"max_iters": 5}, ["Unknown parameter max_iters", "did you mean max_iter?"]),
    (
        {},
        {"lambda": 5},
        ["Unknown parameter lambda", "it knows weight, metric, granularity, origin"],
    ),
    ({}, {"weight": 0}, ["All weights", "zero", "embed_tokens", "positive weight"]),
    ({"weight": [1, -1]}, {}, ["weight of {model}", "mlp", "-1.0"]),
]


@pytest.mark.parametrize(("model_settings", "settings", "words"), BAD_SETTINGS)
def test_bad_settings_stop_while_planning(three_models, merge, model_settings, settings, words):
    if model_settings.get("weight") == [1, -1]:
        model_settings = {"weight": [{"filter": "mlp", "value": [1, -1]}, {"value": 1}]}
    config = bf16_config(three_models[:2], parameters=settings)
    config["models"][1]["parameters"] = model_settings
    outcome = merge(config)
    assert_stopped(outcome, *[word.format(model=three_models[1]) for word in words])
    assert not outcome.out.exists()


def test_bad_settings_of_mergekit_pytorch_stop_too(merge, tmp_path):
    path = str(tmp_path / "m.safetensors")
    save_file({"w": torch.rand(3)}, path)
    for settings, words in (({"weight": -1}, "weight of"), ({"wait": 1}, "did you mean weight?")):
        config = bf16_config([path], parameters=settings)
        outcome = merge(config, command="mergekit-pytorch")
        assert_stopped(outcome, words)


def test_parameters_of_other_methods_are_left_to_them(three_models, merge):
    config = bf16_config(three_models, [1, 1, 1]) | {"merge_method": "linear"}
    config["parameters"] = {"normalise": True}
    assert merge(config).weights


def test_files_that_do_not_fit_leave_nothing_that_loads(three_models, merge, tmp_path):
    """A shape mismatch, a truncated file, a missing tensor: a message, no success, no model."""
    wide = llama(tmp_path / "wide", 5, extra_words=3)
    truncated = Path(shutil.copytree(three_models[1], tmp_path / "truncated"))
    shard = max(truncated.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    missing = Path(shutil.copytree(three_models[1], tmp_path / "missing"))
    index = missing / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(content))
    for number, (model, word) in enumerate(
        [(wide, "vocabularies differ"), (truncated, ""), (missing, "up_proj.weight")]
    ):
        outcome = merge(bf16_config([three_models[0], str(model)]), name=f"m{number}")
        assert outcome.exit_code != 0
        assert word in outcome.output
        assert "tensors merged" not in outcome.output
        assert_nothing_loads(outcome)
