"""The configs and models that a report can be made on, and what is said of those that it cannot."""

from __future__ import annotations

import pytest
import torch
from architectures import write
from configs import config_for
from conftest import llama, weights_of
from reports import report_of, vectors_of
from safetensors.torch import save_file
from wide import angle


def test_the_config_of_another_method_is_seen_as_karcher_would(close_models, cli):
    base, *models = close_models
    parameters = {"density": 0.5, "normalize": True}
    config = config_for(models, [1, 2, 3], base=base, merge_method="ties", parameters=parameters)
    config["models"][0]["parameters"]["density"] = 0.2
    report = report_of(cli("report", "--json", config=config))
    assert report.settings.merge_method == "ties"
    assert report.settings.origin == ["base"]
    assert report.verdict.startswith("The config asks for ties; ")
    same = config_for(models, [1, 2, 3], base=base, origin="base")
    expected = report_of(cli("report", "--json", config=same))
    assert [t.coefficients for t in report.tensors] == [t.coefficients for t in expected.tensors]


OTHERS = {
    "negative weights": ("task_arithmetic", [1, -0.5], {"weight": 1}),
    "zero weights": ("linear", [0, 0], {}),
    "dict references": ("linear", [1, 1], {}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_ordinary_configs_of_other_methods_are_reported_on(case, close_models, cli):
    method, weights, parameters = OTHERS[case]
    base, *models = close_models
    config = config_for(
        models[:2],
        weights,
        base=base if method == "task_arithmetic" else None,
        merge_method=method,
        parameters=parameters,
    )
    if case == "dict references":
        for model in config["models"]:
            model["model"] = {"model": {"path": model["model"]}}
    report = report_of(cli("report", "--json", config=config))
    tensor = report.tensors[-1]
    assert tensor.unique
    assert (tensor.origin == "base") == (method == "task_arithmetic")


def test_slices_of_other_methods_decide_their_origin_one_by_one(close_models, cli):
    base, first, second, _ = close_models
    slices = [
        [(base, 0, 2), (first, 0, 2), (second, 0, 2)],
        [(base, 2, 3), (first, 2, 3)],
    ]
    config = {
        "merge_method": "ties",
        "base_model": base,
        "slices": [
            {"sources": [{"model": m, "layer_range": [start, end]} for m, start, end in sources]}
            for sources in slices
        ],
        "dtype": "float32",
    }
    report = report_of(cli("report", "--json", config=config))
    origins = {t.layer: t.origin for t in report.tensors if t.kind == "up"}
    assert origins == {0: "base", 1: "base", 2: "zero"}


def test_slices_name_models_and_leave_gaps(close_models, cli):
    _, first, second, third = close_models
    sources = [
        [{"model": first, "layer_range": [0, 2]}, {"model": second, "layer_range": [1, 3]}],
        [{"model": third, "layer_range": [1, 2]}, {"model": second, "layer_range": [0, 1]}],
    ]
    config = {
        "merge_method": "karcher",
        "slices": [{"sources": pair} for pair in sources],
        "dtype": "float32",
    }
    report = report_of(cli("report", "--json", config=config))
    assert [model.name for model in report.models] == ["tune1", "tune2", "tune3"]
    up = {t.layer: t for t in report.tensors if t.kind == "up"}
    assert sorted(up) == [0, 1, 2]
    name = "model.layers.{}.mlp.up_proj.weight"
    pair = [*vectors_of([first], name.format(0)), *vectors_of([second], name.format(1))]
    assert up[0].angles[0][1] == pytest.approx(angle(*pair), rel=1e-6)
    assert up[0].norms[2] is None
    pair = [*vectors_of([second], name.format(0)), *vectors_of([third], name.format(1))]
    assert up[2].angles[1][2] == pytest.approx(angle(*pair), rel=1e-6)
    assert up[2].coefficients[0] is None


def test_tied_heads_count_once_and_adapters_are_read(tmp_path, cli, close_models):
    options = {"dtype": torch.float32, "tie_word_embeddings": True}
    tied = [llama(tmp_path / f"t{seed}", seed, **options) for seed in range(2)]
    report = report_of(cli("report", "--json", config=config_for(tied)))
    assert [t.kind for t in report.tensors if t.kind in ("head", "embeddings")] == ["embeddings"]

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(close_models[0])
    settings = LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    config = config_for([f"{close_models[0]}+{tmp_path / 'adapter'}", close_models[0]])
    result = cli("report", "--json", "--lora-merge-cache", tmp_path / "cache", config=config)
    report = report_of(result)
    assert report.models[0].name == "base+adapter"
    changed = {t.kind for t in report.tensors if t.angles[0][1]}
    assert changed == {"up"}


def test_raw_checkpoints(tmp_path, cli):
    files = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"{i}.weight": torch.randn(5, 4, generator=generator) for i in range(3)}
        tensors["steps"] = torch.tensor([7])
        save_file(tensors, tmp_path / f"raw{seed}.safetensors")
        files.append(str(tmp_path / f"raw{seed}.safetensors"))
    report = report_of(cli("report", "--json", config=config_for(files)))
    assert [t.name for t in report.tensors] == ["0.weight", "1.weight", "2.weight"]
    assert [model.name for model in report.models] == ["raw0.safetensors", "raw1.safetensors"]
    assert report.verdict.startswith("These two models are ")


WRONG = {
    "no file": (None, 2, "does not exist"),
    "not YAML": ("a: [", 1, "is not valid YAML"),
    "empty": ("", 1, "is empty"),
    "no config": ("a: 1", 1, "it has no merge_method"),
    "two stages": ("merge_method: karcher\n---\nmerge_method: karcher", 1, "has 2 documents"),
    "no models": ("merge_method: karcher", 1, "Exactly one of 'models'"),
    "wrong field": ("merge_method: karcher\nmodels: 7", 1, "not one that mergekit reads: models"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_config_gets_one_sentence(case, cli, tmp_path):
    text, status, words = WRONG[case]
    path = tmp_path / "c.yml"
    if text is not None:
        path.write_text(text)
    result = cli("report", path)
    assert result.exit_code == status
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) <= (1 if status == 1 else 4)


def test_a_model_that_is_not_there_and_parameters_that_are_not(cli, close_models, tmp_path):
    result = cli("report", "--quiet", config=config_for([*close_models[1:3], str(tmp_path / "no")]))
    assert result.exit_code == 1
    assert str(tmp_path / "no") in result.stderr
    assert "Traceback" not in result.output
    result = cli("report", config=config_for(close_models[1:], parameters={"wieght": 2}))
    assert (result.exit_code, "did you mean weight?" in result.stderr) == (1, True)
    single = cli("report", "--quiet", config=config_for(close_models[1:2]))
    assert (single.exit_code, "nothing to compare" in single.stderr) == (1, True)


@pytest.mark.parametrize(
    ("name", "near"), [("dare-ties", "dare_ties"), ("karchner", "karcher"), ("zzz", "linear")]
)
def test_a_merge_method_that_does_not_exist(three_models, cli, name, near):
    result = cli("report", config=config_for(three_models) | {"merge_method": name})
    assert result.exit_code == 1
    assert f"Error: mergekit has no merge_method: {name}; " in result.output
    assert near in result.output


def test_raw_checkpoints_of_which_some_lack_a_tensor(cli, tmp_path, caplog):
    paths = [str(tmp_path / f"{seed}.safetensors") for seed in range(2)]
    save_file({"w": torch.rand(3), "position_ids": torch.arange(3)}, paths[0])
    save_file({"w": torch.rand(3)}, paths[1])
    result = cli("report", config=config_for(paths))
    assert result.exit_code == 0, result.output
    assert f"{paths[1]} has no position_ids, which other models have" in caplog.text
    assert "--tensor-union" in caplog.text


def test_a_tensor_that_the_plan_reads_twice_counts_once(cli, tmp_path):
    """A vision tower may name one tensor of its checkpoint in two modules."""
    paths = [write("qwen2_5_vl", tmp_path / str(seed), seed) for seed in range(2)]
    report = report_of(cli("report", "--json", config=config_for(paths)))
    names = [tensor.name for tensor in report.tensors]
    assert len(names) == len(set(names))
    assert set(names) == set(weights_of(paths[0]))
