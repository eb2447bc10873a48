"""A config that mergekit reads otherwise than it was meant stops before anything is read."""

from __future__ import annotations

import pytest
import torch
import yaml
from configs import config_for
from mergekit.config import MergeConfiguration
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig
from safetensors.torch import save_file

from mergekit_karcher.errors import KarcherError

A, B = "some/a", "some/b"


def beside(**keys):
    """A config whose first model has those keys beside `model`."""
    config = config_for([A, B])
    config["models"][0] |= keys
    return config


def with_slices(*ranges, **keys):
    sources = [
        {"model": model, "layer_range": list(span)}
        for model, span in zip([A, B], ranges, strict=True)
    ]
    return {"merge_method": "karcher", "slices": [{"sources": sources, **keys}]}


# What is written, and the words of the error.
UNREAD_KEYS = {
    "a weight beside its model": (
        beside(weight=0.9),
        ["weight directly under some/a", "parameters of some/a"],
    ),
    "a shared parameter beside a model": (
        beside(granularity="row"),
        ["granularity directly under some/a", "parameters of the config or of a slice"],
    ),
    "parameters misspelt": (beside(paramaters={"weight": 9}), ["did you mean parameters?"]),
    "a parameter at the top": (
        config_for([A, B]) | {"granularity": "row"},
        ["granularity directly under the config", "parameters of the config"],
    ),
    "a key of the top under a model": (
        beside(out_dtype="bfloat16"),
        ["out_dtype directly under some/a", "belongs to the top level"],
    ),
    "a key that is nowhere": (
        config_for([A, B]) | {"push_to_hub": True},
        ["push_to_hub directly under the config", "remove it"],
    ),
    "a filter misspelt": (
        config_for([A, B], granularity=[{"fliter": "mlp", "value": "row"}, {"value": "tensor"}]),
        ["fliter directly under", "did you mean filter?"],
    ),
    "a weight in a slice": (
        with_slices([0, 2], [0, 2], weight=2),
        ["weight directly under slices[0]:", "parameters of slices[0]"],
    ),
    "a key of a module": (
        {
            "merge_method": "karcher",
            "modules": {"default": {"models": [{"model": A}, {"model": B}], "dtype": "float32"}},
        },
        ["dtype directly under default of modules", "top level"],
    ),
    "a key of a tokenizer": (
        config_for([A, B]) | {"tokenizer": {"sauce": "union"}},
        ["sauce directly under tokenizer", "did you mean source?"],
    ),
    "a key that no merge reads": (
        with_slices([0, 2], [0, 2], residual_weight=0.5),
        ["residual_weight directly under slices[0]"],
    ),
}


@pytest.mark.parametrize(("config", "words"), UNREAD_KEYS.values(), ids=UNREAD_KEYS)
@pytest.mark.parametrize("method", ["karcher", "karcher_mean", "fisher", "regmean"])
def test_a_key_that_nothing_reads_is_an_error(config, words, method):
    if method in ("fisher", "regmean"):
        config = yaml.safe_load(yaml.safe_dump(config).replace("granularity", "floor"))
        words = [word.replace("granularity", "floor") for word in words]
    document = config | {"merge_method": method}
    for read in (MergeConfiguration.model_validate, lambda d: MergeConfiguration(**d)):
        with pytest.raises(KarcherError) as caught:
            read(document)
        for word in words:
            assert word in str(caught.value)


def test_mergekits_own_methods_keep_their_own_ways():
    config = MergeConfiguration.model_validate(beside(weight=0.9) | {"merge_method": "linear"})
    assert config.merge_method == "linear"


def test_every_key_that_mergekit_reads_passes():
    config = config_for([A, B], [[{"filter": "mlp", "value": [0, 1]}, {"value": 2}], 1], base=A)
    config |= {"name": "stage", "out_dtype": "bfloat16", "chat_template": "auto"}
    config["models"][1]["model"] = {"model": {"path": B}, "lora": None}
    config["tokenizer"] = {
        "source": "union",
        "pad_to_multiple_of": 8,
        "tokens": {
            "<a>": {"source": A, "force": True},
            "<b>": {"source": {"kind": "model_token", "model": A, "token": "<c>"}},
            "<c>": {"source": {"kind": "zero"}},
        },
    }
    once = MergeConfiguration.model_validate(config)
    again = MergeConfiguration.model_validate(once.model_dump())
    assert again == once
    assert MergeConfiguration.model_validate(yaml.safe_load(once.to_yaml())) == once


def test_every_command_stops(three_models, merge, cli, tmp_path):
    config = config_for(three_models) | {"granularity": "row"}
    results = [
        merge(config),
        merge(config, command="mergekit-pytorch"),
        merge(
            [config | {"name": "one"}, config_for(["one", three_models[0]])],
            command="mergekit-multi",
        ),
        cli("report", config=config),
    ]
    for result in results:
        assert result.exit_code == 1
        assert "Error: mergekit does not read granularity" in result.output
    assert not results[0].out.exists()
    raw = {"merge_method": "karcher", "models": [{"model": "a.pt"}], "slices": []}
    with pytest.raises(KarcherError, match="slices directly under the config: mergekit-yaml and"):
        RawPyTorchMergeConfig.model_validate(raw)


# Parameters of the whole merge, and the words of the error.
MISREAD = {
    "no weight": ({"weight": []}, ["weight of the config is an empty list"]),
    "no weight behind a filter": (
        {"weight": [{"filter": "mlp", "value": []}]},
        ["weight of the config is an empty list"],
    ),
    "words as a gradient": (
        {"granularity": ["tensor", "row"]},
        ["granularity of the config is a list", "only numbers"],
    ),
    "an entry behind all others": (
        {"weight": [{"value": 1}, {"filter": "mlp", "value": 2}]},
        ["weight of the config has an entry without a filter before others"],
    ),
    "a filter without a tensor": (
        {"weight": [{"filter": "self_atn", "value": 2}, {"value": 1}]},
        ["filter: self_atn of weight in the config matches no tensor", "did you mean self_attn?"],
    ),
    "a filter with wildcards": (
        {"granularity": [{"filter": "*mlp*", "value": "row"}, {"value": "tensor"}]},
        ["filter: *mlp* of granularity", "without wildcards"],
    ),
}


@pytest.mark.parametrize(("parameters", "words"), MISREAD.values(), ids=MISREAD)
def test_a_value_that_mergekit_would_misread(three_models, merge, cli, parameters, words):
    config = config_for(three_models[:2]) | {"parameters": parameters}
    outcome = merge(config)
    for result in (outcome, cli("report", config=config)):
        assert result.exit_code == 1
        (error,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
        for word in words:
            assert word in error
    assert not outcome.out.exists()


def test_a_filter_that_matches_one_models_names_is_read(three_models, merge):
    """Filters of a model are about its names, which slices make others than the output's."""
    sources = [
        {"model": three_models[0], "layer_range": [0, 1]},
        {
            "model": three_models[1],
            "layer_range": [2, 3],
            "parameters": {"weight": [{"filter": "layers.2.", "value": 3}, {"value": 1}]},
        },
    ]
    config = {"merge_method": "karcher", "dtype": "float32", "slices": [{"sources": sources}]}
    assert merge(config).weights


def test_filters_of_mergekit_pytorch(merge, tmp_path):
    path = str(tmp_path / "m.safetensors")
    save_file({"head.weight": torch.rand(3)}, path)
    weight = [{"filter": "haed", "value": 2}, {"value": 1}]
    outcome = merge(config_for([path], [weight]), command="mergekit-pytorch")
    assert outcome.exit_code == 1
    assert "filter: haed" in outcome.output
    assert "did you mean head?" in outcome.output


@pytest.mark.parametrize("span", [[0, -1], [2, 2], [-1, 1], [3, 1]])
def test_a_slice_without_layers(three_models, merge, cli, span):
    sources = [{"model": model, "layer_range": span} for model in three_models[:2]]
    config = {"merge_method": "karcher", "dtype": "float32", "slices": [{"sources": sources}]}
    for result in (merge(config), cli("report", config=config)):
        assert result.exit_code == 1
        assert f"Error: layer_range: {span} of {three_models[0]} has no layers" in result.output


def test_a_model_listed_twice(three_models, merge, cli):
    config = config_for([*three_models, three_models[0]])
    for result in (merge(config), cli("report", config=config)):
        assert result.exit_code == 1
        assert f"Error: {three_models[0]} is listed 2 times" in result.output
        assert "with a weight of 2" in result.output


def test_a_module_that_the_architecture_does_not_have(three_models, merge, cli):
    models = [{"model": model} for model in three_models]
    config = {"merge_method": "karcher", "modules": {"language_model": {"models": models}}}
    for result in (merge(config), cli("report", config=config)):
        assert result.exit_code == 1
        assert "Error: modules: language_model is none of the modules" in result.output
        assert "which are default." in result.output


def test_what_mergekits_planner_says_comes_without_a_traceback(three_models, merge):
    """Sources of unequal lengths, which mergekit itself refuses."""
    sources = [
        {"model": model, "layer_range": span}
        for model, span in zip(three_models, ([0, 1], [0, 2]), strict=False)
    ]
    outcome = merge({"merge_method": "karcher", "slices": [{"sources": sources}]})
    assert outcome.exit_code == 1
    assert "Error: mergekit could not plan this merge (RuntimeError: All inputs" in outcome.output
    assert "Traceback" not in outcome.output
