"""`mergekit-karcher suggest` tells models of every kind apart, and its configs run."""

from __future__ import annotations

import pytest
import torch
import yaml
from click.testing import CliRunner
from configs import config_for
from conftest import assert_error, llama, weights_of
from safetensors.torch import load_file, save_file

from mergekit_karcher.cli.main import main

# What is suggested for each kind of models: method, its parameters, whether around the base, words.
SUGGESTED = {
    "fine-tunes": ("fisher", None, True, "which needs no data"),
    "without a base": ("karcher", None, False, "If you have the base"),
    "unrelated": ("karcher", {"magnitude": "linear"}, False, "align the models"),
    "of another base": ("karcher", None, False, "without that base"),
    "hardly changed": ("karcher", None, False, "rounding error"),
    "crowded": ("linear", None, False, "more than their network holds"),
    "even": ("linear", None, False, "No merge without data"),
}
# How long the changes of some of them are, beside the base; of the others 0.05.
CHANGES = {"crowded": 0.8, "hardly changed": 1e-6}
# Those that take all inputs of a layer alike; of the others most of the change is in a few.
EVEN = ("crowded", "even")


def model(folder, share=0.0, seed=0, origin=0, even=False):
    """A model whose matrices have changed at random by that share of their size.

    Norms, which are a large part of such small models, are made short.
    """
    llama(folder, origin)
    generator = torch.Generator().manual_seed(seed)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            values = tensor.float()
            noise = torch.randn(values.shape, generator=generator)
            if not even:
                noise *= 0.6 ** torch.arange(values.shape[-1])
                noise /= noise.square().mean().sqrt()
            values = values / 100 if values.ndim < 2 else values + share * values.std() * noise
            tensors[name] = values.to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


def models_of(kind, folder):
    """The models of a kind, and the words that name their base."""
    share, seeds = CHANGES.get(kind, 0.05), (1, 2, 3)
    origins = seeds if kind == "unrelated" else (0, 0, 0)
    models = [
        model(folder / f"m{seed}", share, seed, origin, kind in EVEN)
        for seed, origin in zip(seeds, origins, strict=True)
    ]
    if kind in ("unrelated", "without a base"):
        return models, []
    return models, ["--base", model(folder / "base", origin=9 if "another" in kind else 0)]


def suggest(*words):
    return CliRunner().invoke(main, ["suggest", *map(str, words)])


@pytest.mark.parametrize("kind", SUGGESTED)
def test_each_kind_of_models_gets_its_config(kind, tmp_path, merge):
    method, parameters, around_base, words = SUGGESTED[kind]
    models, base = models_of(kind, tmp_path)
    out = tmp_path / "config.yml"
    result = suggest(*models, *base, "--out", out)
    assert result.exit_code == 0, result.output
    said, text = " ".join(result.stderr.split()), out.read_text()
    assert words in said
    # The config says why it is what it is.
    comments = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    assert words in " ".join(comments)
    config = yaml.safe_load(text)
    assert (config["merge_method"], config.get("parameters")) == (method, parameters)
    assert ("base_model" in config) is around_base
    assert [entry["model"] for entry in config["models"]] == models
    assert merge(config).weights.keys() == weights_of(models[0]).keys()


def test_a_config_goes_to_standard_output_and_nothing_else_does(tmp_path):
    models, base = models_of("fine-tunes", tmp_path)
    result = suggest(*models, *base)
    assert yaml.safe_load(result.stdout)["base_model"] == base[1]
    assert "Suggestion: " in result.stderr


def test_a_report_ends_with_the_same_suggestion(tmp_path, cli):
    models, (_, base) = models_of("fine-tunes", tmp_path)
    config = config_for(models, base=base, merge_method="task_arithmetic")
    shown = " ".join(cli("report", "--out", tmp_path / "geometry", config=config).output.split())
    suggested = " ".join(suggest(*models, "--base", base).stderr.split())
    sentence = suggested[suggested.index("Suggestion: ") :]
    assert sentence in shown
    assert sentence in " ".join((tmp_path / "geometry" / "report.md").read_text().split())


def test_a_model_that_changed_all_inputs_alike_is_named(tmp_path, cli):
    models = [model(tmp_path / "some", 0.05, 1), model(tmp_path / "all", 0.05, 2, even=True)]
    config = config_for(models, base=model(tmp_path / "base"), merge_method="fisher")
    config["parameters"] = {"metric": "self"}
    shown = " ".join(cli("report", config=config).output.split())
    assert "But the changes of all take up to" in shown


def test_misuse_is_one_sentence(tmp_path):
    models, _ = models_of("fine-tunes", tmp_path)
    (tmp_path / "there.yml").write_text("")
    assert_error(suggest(models[0]), "A merge needs two models or more")
    assert_error(suggest(*models, "--out", tmp_path / "there.yml"), "there.yml is there already")
    assert_error(suggest(*models, "--base", tmp_path / "none"), "none")
