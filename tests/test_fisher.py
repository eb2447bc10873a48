"""Precision-weighted means: the third paper's example, its equations, and real merges."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from configs import config_for
from conftest import llama, weights_of
from hub import Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_karcher import fisher_mean, karcher_mean
from mergekit_karcher.cli.main import main
from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.kernels import precision
from mergekit_karcher.means.fisher import shares_of
from mergekit_karcher.means.inputs import checked_inputs
from mergekit_karcher.report.schema import Report

TOY = Path(__file__).parent.parent / "example_configs" / "metric_toy"


def j(theta, optima, metrics, weights=None):
    """What the paper minimises: the sum of squared distances, each in its own metric."""
    weights = weights if weights is not None else np.ones(len(optima))
    return sum(
        w * (g * (theta - o) ** 2).sum() for w, o, g in zip(weights, optima, metrics, strict=True)
    )


def random_problem(seed, count=3, size=40):
    rng = np.random.default_rng(seed)
    optima = rng.standard_normal((count, size))
    metrics = np.exp(6 * rng.standard_normal((count, size)))
    return optima, metrics, rng.uniform(0.1, 3, count)


def merged(optima, metrics, weights=None, **options):
    return fisher_mean(
        [torch.as_tensor(o) for o in optima],
        [None if g is None else torch.as_tensor(g) for g in metrics],
        weights,
        **options,
    ).numpy()


def test_the_papers_example_through_mergekit_pytorch(merge, tmp_path, monkeypatch):
    """J of the linear mean is 50.5, that of the best point 1.98 (third paper, toy example)."""
    shutil.copytree(TOY, tmp_path / "example_configs" / "metric_toy")
    monkeypatch.chdir(tmp_path)
    toy = runpy.run_path(str(tmp_path / "example_configs/metric_toy/make.py"), run_name="__main__")
    config = yaml.safe_load((TOY / "config.yml").read_text())
    optima, metrics = (np.array([*toy[key].values()]) for key in ("OPTIMA", "METRICS"))

    def value(outcome):
        return j(outcome.weights["theta"].double().numpy(), optima, metrics)

    fisher = merge(config, command="mergekit-pytorch")
    assert f"{value(fisher):.2f}" == "1.98"
    plain = [{"model": m["model"], "parameters": {"weight": 1}} for m in config["models"]]
    linear = {"merge_method": "linear", "models": plain}
    assert f"{value(merge(linear, command='mergekit-pytorch', name='linear')):.1f}" == "50.5"


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_the_answer_zeroes_the_gradient_of_j_and_nothing_near_it_is_lower(seed):
    optima, metrics, weights = random_problem(seed)
    found = merged(optima, metrics, weights, floor=0)
    gradient = (weights[:, None] * metrics * (found - optima)).sum(0)
    scale = (weights[:, None] * metrics * np.abs(optima)).sum(0)
    assert (np.abs(gradient) <= 1e-13 * scale).all()
    step = 1e-3 * np.random.default_rng(seed).standard_normal(len(found))
    assert j(found + step, optima, metrics, weights) > j(found, optima, metrics, weights)


def test_equal_metrics_give_the_linear_mean_and_scaling_all_changes_nothing():
    optima, metrics, weights = random_problem(1)
    linear = weights @ optima / weights.sum()
    np.testing.assert_allclose(merged(optima, [metrics[0]] * 3, weights), linear, rtol=1e-12)
    np.testing.assert_allclose(merged(optima, [None] * 3, weights), linear, rtol=1e-12)
    found = merged(optima, metrics, weights)
    assert (merged(optima, metrics * 2.0**-70, weights) == found).all()
    np.testing.assert_allclose(merged(optima, metrics * 1e-24, weights), found, rtol=1e-12)


def test_infinite_confidence_in_one_model_gives_that_model():
    optima, metrics, _ = random_problem(2)
    metrics[1] *= 1e30
    np.testing.assert_allclose(merged(optima, metrics, floor=0), optima[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("k", [2.0, 100.0, 1e6])
def test_averaging_is_arbitrarily_far_off(k):
    """For diag(k, 1) against diag(1, k) it is worse by (k + 1)^2 / 4k."""
    optima, metrics = np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[k, 1.0], [1.0, k]])
    best = j(merged(optima, metrics, floor=0), optima, metrics)
    ratio = j(optima.mean(0), optima, metrics) / best
    assert ratio == pytest.approx((k + 1) ** 2 / (4 * k), rel=1e-9)


def test_a_floor_is_relative_to_each_metric():
    optima, metrics, _ = random_problem(3)
    floored = metrics + 0.1 * metrics.mean(1, keepdims=True)
    expected = (floored * optima).sum(0) / floored.sum(0)
    np.testing.assert_allclose(merged(optima, metrics, floor=0.1), expected, rtol=1e-12)
    dead = metrics.copy()
    dead[:, 7] = 0
    assert np.isfinite(merged(optima, dead)).all()
    means = dead.mean(1)
    assert merged(optima, dead)[7] == pytest.approx(means @ optima[:, 7] / means.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_once_over_pieces_and_strides(dtype, monkeypatch):
    monkeypatch.setattr(precision, "CHUNK_ELEMENTS", 37)
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(30, 40, generator=generator).to(dtype) for _ in range(3)]
    metrics = [torch.rand(40, 30, generator=generator).T for _ in range(3)]
    found = fisher_mean(tensors, metrics, [1, 2, 3])
    assert found.dtype == dtype
    wide = [
        w * (m.double() + 1e-6 * m.double().mean()) for w, m in zip((1, 2, 3), metrics, strict=True)
    ]
    exact = sum(m * t.double() for m, t in zip(wide, tensors, strict=True)) / sum(wide)
    # One unit in the last place only where the exact value is a tie to within float64.
    assert (found == exact.to(dtype)).float().mean() > 0.999
    torch.testing.assert_close(found, exact.to(dtype))


def test_frozen_layers_and_all_zero_metrics(caplog):
    optima, metrics, weights = random_problem(5)
    metrics[1] = 0
    rest = [0, 2]
    expected = merged(optima[rest], metrics[rest], weights[rest])
    np.testing.assert_array_equal(merged(optima, metrics, weights), expected)
    found = merged(optima, 0 * metrics, weights, name="w")
    np.testing.assert_allclose(found, weights @ optima / weights.sum(), rtol=1e-12)
    assert "The metrics of w are zero in every model" in caplog.text
    metrics[2] = 0
    np.testing.assert_array_equal(merged(optima, metrics, weights), optima[0])


def test_a_model_of_weight_zero_may_hold_anything():
    optima, metrics, _ = random_problem(6)
    spoiled, bad = optima.copy(), metrics.copy()
    spoiled[1], bad[1] = np.nan, -1
    expected = merged(optima[[0, 2]], metrics[[0, 2]], [1, 2])
    np.testing.assert_array_equal(merged(spoiled, bad, [1, 0, 2]), expected)


BAD = {
    "negative": (lambda g: g - 2 * g.max(), "is negative"),
    "nan": (lambda g: np.where(np.arange(len(g)) == 3, np.nan, g), "is not finite everywhere"),
    "infinite": (lambda g: np.where(np.arange(len(g)) == 3, np.inf, g), "is not finite"),
    "shape": (lambda g: g[:-1], "has shape \\(39,\\), but the tensor has \\(40,\\)"),
    "whole numbers": (lambda g: np.ones(len(g), np.int64), "give floating-point numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_metric_gets_one_sentence(case):
    change, words = BAD[case]
    optima, metrics, _ = random_problem(7)
    given = [metrics[0], change(metrics[1]), metrics[2]]
    with pytest.raises(KarcherError, match=words) as caught:
        merged(optima, given, labels=["a", "b", "c"], name="layer.weight")
    assert "layer.weight for b" in str(caught.value)


@pytest.fixture(scope="module")
def with_metrics(tmp_path_factory):
    """Three models in shards, and metrics of theirs, one sharded like it and two in one file."""
    folder = tmp_path_factory.mktemp("fisher")
    found = []
    for seed in range(3):
        model = llama(folder / f"m{seed}", seed, dtype=torch.float32)
        generator = torch.Generator().manual_seed(50 + seed)
        metric = {
            name: 1e-12 * torch.rand(t.shape, generator=generator) ** 4
            for name, t in weights_of(model).items()
        }
        path = folder / f"g{seed}"
        if seed == 0:
            shutil.copytree(model, path)
            for file in path.glob("*.safetensors"):
                own = {name: metric[name] for name in load_file(file)}
                save_file(own, file, metadata={"format": "pt"})
        else:
            path.mkdir()
            save_file(metric, path / "model.safetensors", metadata={"format": "pt"})
        found.append((model, str(path), metric))
    return found


def fisher_config(models, metrics, weights=None, **settings):
    return config_for(models, weights, metrics=metrics, merge_method="fisher", **settings)


def test_a_real_merge_reads_metrics_beside_the_weights(with_metrics, merge):
    models, metrics, tensors = zip(*with_metrics, strict=True)
    outcome = merge(fisher_config(models, metrics, [1, 2, 0.5]))
    inputs = [weights_of(model) for model in models]
    for name, found in outcome.weights.items():
        wide = [
            w * (g[name].double() + 1e-6 * g[name].double().mean())
            for w, g in zip([1, 2, 0.5], tensors, strict=True)
        ]
        exact = sum(p * i[name].double() for p, i in zip(wide, inputs, strict=True)) / sum(wide)
        torch.testing.assert_close(found.double(), exact, rtol=2**-23, atol=1e-12)
    assert "Fisher-weighted mean" in (outcome.out / "README.md").read_text()
    count = len(outcome.weights)
    assert (
        f"fisher merged: {count} tensors merged, each parameter weighed by the metrics of its "
        "models." in outcome.output
    )


def test_slices_take_the_metric_of_the_inputs_own_layer(with_metrics, merge):
    models, metrics, tensors = zip(*with_metrics[:2], strict=True)
    ranges = [[0, 2], [1, 3]]
    sources = [
        {"model": model, "layer_range": own, "parameters": {"metric": metric}}
        for model, metric, own in zip(models, metrics, ranges, strict=True)
    ]
    config = {"merge_method": "fisher", "slices": [{"sources": sources}], "dtype": "float32"}
    weights = merge(config).weights
    name = "model.layers.{}.mlp.up_proj.weight"
    for layer in (0, 1):
        own = [name.format(layer), name.format(layer + 1)]
        given = [weights_of(model)[key] for model, key in zip(models, own, strict=True)]
        expected = fisher_mean(given, [t[key] for t, key in zip(tensors, own, strict=True)])
        assert torch.equal(weights[name.format(layer)], expected)


def test_a_base_takes_no_part_around_itself(with_metrics, merge):
    models, metrics, _ = zip(*with_metrics, strict=True)
    around = fisher_config(models[:2], metrics[:2], base_model=models[2])
    refused = merge(around)
    assert (refused.exit_code, "needs a metric for" in refused.output) == (1, True)
    around["parameters"] = {"origin": "base"}
    found = merge(around, name="around").weights
    expected = merge(fisher_config(models[:2], metrics[:2]), name="two").weights
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_identity_by_filter_and_mistakes_while_planning(with_metrics, merge, tmp_path):
    models, metrics, tensors = zip(*with_metrics[:2], strict=True)
    by_filter = [{"filter": "mlp", "value": metrics[1]}, {"value": "identity"}]
    weights = merge(fisher_config(models, [metrics[0], by_filter])).weights
    name = "model.norm.weight"
    given = [weights_of(model)[name] for model in models]
    assert torch.equal(weights[name], fisher_mean(given, [tensors[0][name], None]))

    lacking = tmp_path / "lacking"
    lacking.mkdir()
    some = {k: v for k, v in tensors[1].items() if "mlp" not in k}
    save_file(some, lacking / "model.safetensors")
    for metric, words in (
        (str(lacking), ["has no model.layers.0.mlp", models[1]]),
        (str(tmp_path / "nowhere"), ["cannot be opened", models[1]]),
        ("", ["needs a metric for", models[1], "metric: identity"]),
    ):
        outcome = merge(fisher_config(models, [metrics[0], metric]), name="bad")
        assert outcome.exit_code == 1
        assert all(word in outcome.output for word in words), outcome.output
        assert not outcome.out.exists()
    misspelt = fisher_config(models, metrics)
    misspelt["models"][0]["parameters"]["metrik"] = "x"
    assert "did you mean metric?" in merge(misspelt, name="misspelt").output


def test_zeros_in_every_model_are_named_once_at_the_end(with_metrics, merge, tmp_path, caplog):
    models, _, tensors = zip(*with_metrics[:2], strict=True)
    metrics = []
    for index, metric in enumerate(tensors):
        folder = tmp_path / f"zeros{index}"
        folder.mkdir()
        own = {name: 0 * t if "up_proj" in name else t for name, t in metric.items()}
        save_file(own, folder / "model.safetensors")
        metrics.append(str(folder))
    for method in ("fisher", "karcher"):
        config = fisher_config(models, metrics) | {"merge_method": method}
        caplog.clear()
        outcome = merge(config, name=method)
        assert caplog.text.count("zero in every model: it is merged as without any") == 1
        (line,) = [line for line in outcome.output.splitlines() if "  metrics zero in" in line]
        names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
        assert line.startswith("  metrics zero in every model, merged as without any: ")
        assert sorted(line.split(": ")[1].split(", ")) == names
        given = [weights_of(model)[names[0]] for model in models]
        mean = (given[0].double() + given[1]) / 2
        if method == "karcher":
            mean = karcher_mean(given)[0].double()
        torch.testing.assert_close(outcome.weights[names[0]].double(), mean, rtol=1e-7, atol=0)


def test_what_metrics_say_of_themselves_is_compared(with_metrics, merge, tmp_path, caplog):
    models, metrics, _ = zip(*with_metrics, strict=True)
    copies = [shutil.copytree(metric, tmp_path / f"c{i}") for i, metric in enumerate(metrics)]

    def say(index, **about):
        (copies[index] / "metric.json").write_text(json.dumps(about))

    def warnings(method):
        caplog.clear()
        merge(fisher_config(models, map(str, copies)) | {"merge_method": method}, name=method)
        return caplog.text

    for index in range(3):
        say(index, kind="Fisher", length=64, model=models[index])
    for method in ("fisher", "karcher"):
        assert "metric" not in warnings(method)
    say(1, kind="Fisher", length=128, model=models[1])
    assert "were made in different ways" in warnings("karcher")
    say(1, kind="Fisher", length=64, model=models[2])
    assert f"of {models[1]} was made of {models[2]}" in warnings("fisher")


def test_the_report_shows_which_model_counts_for_how_much(with_metrics, tmp_path):
    """Of fisher itself, and not what karcher would do."""
    models, metrics, tensors = zip(*with_metrics, strict=True)
    config = fisher_config(models, metrics, [1, 2, 0.5])
    file, out = tmp_path / "fisher.yml", tmp_path / "geometry"
    file.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(main, ["report", str(file), "--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    report = Report.model_validate_json(result.stdout)
    assert not report.settings.as_karcher
    assert not report.settings.in_metric
    total = size = 0.0
    for tensor in report.tensors:
        values = [g[tensor.name].double() for g in tensors]
        wide = [w * (g + 1e-6 * g.mean()) for w, g in zip([1, 2, 0.5], values, strict=True)]
        expected = [float((part / sum(wide)).mean()) for part in wide]
        assert tensor.shares == pytest.approx(expected, rel=1e-9)
        assert tensor.coefficients is None
        vectors = [weights_of(model)[tensor.name].double().ravel() for model in models[:2]]
        cosine = torch.nn.functional.cosine_similarity(*vectors, dim=0)
        assert tensor.angles[0][1] == pytest.approx(float(torch.arccos(cosine)), abs=1e-6)
        total += tensor.size * expected[1]
        size += tensor.size
    assert report.overall.shares[1] == pytest.approx(total / size)
    assert "karcher" not in report.verdict
    assert (
        f"In the fisher mean {report.models[1].name} counts for {100 * total / size:.3g} %, "
        in (report.verdict)
    )
    assert {path.name for path in out.glob("*.png")} == {"angles.png", "models.png", "shares.png"}
    assert "**How much each model counts, in %**" in (out / "report.md").read_text()


@pytest.mark.parametrize("weight", [-1, float("nan")])
def test_a_wrong_weight_stops_while_planning(with_metrics, merge, weight):
    models, metrics, _ = zip(*with_metrics, strict=True)
    outcome = merge(fisher_config(models, metrics, [1, weight, 1]))
    assert f"Error: The weight of {models[1]} for " in outcome.output
    assert not outcome.out.exists()


def test_where_no_metric_says_anything_the_weights_count():
    inputs = [torch.rand(3), torch.rand(3)]
    metrics = [torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 0.0])]
    checked = checked_inputs("w", inputs, None, [1, 3], metrics=metrics)
    assert shares_of(checked, 0.0) == pytest.approx([(0.25 + 0.25 + 1) / 3, (0.75 + 0.75) / 3])
    assert shares_of(checked_inputs("w", inputs, None, [1, 3]), 0.0) == pytest.approx([0.25, 0.75])


def test_a_base_that_takes_part_needs_a_metric(with_metrics, merge):
    models, metrics, _ = zip(*with_metrics, strict=True)
    outcome = merge(fisher_config(models[:2], metrics[:2], base_model=models[2]))
    assert "or origin: base, where the base takes no part" in outcome.output


def test_the_card_names_no_path_of_a_metric(with_metrics, merge, tmp_path):
    models, metrics, _ = zip(*with_metrics, strict=True)
    filtered = [[{"filter": "mlp", "value": metric}, {"value": metric}] for metric in metrics]
    config = fisher_config(models, filtered) | {"merge_method": "karcher"}
    outcome = merge(config)
    file = tmp_path / "again.yml"
    file.write_text(yaml.safe_dump(config))
    geometry = str(outcome.out / "geometry")
    for arguments in (["report", str(file), "--out", geometry], ["card", str(outcome.out)]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    for name in ("README.md", "mergekit_config.yml"):
        text = (outcome.out / name).read_text()
        assert not any(metric in text for metric in metrics)
        assert "value: g1" in text


def test_a_metric_by_its_hub_id(with_metrics, merge, tmp_path):
    """Uploaded and fetched by the real client, from a stand-in for the Hub."""
    models, metrics, _ = zip(*with_metrics[:2], strict=True)
    config = fisher_config(models, ["me/metric", metrics[1]])
    (tmp_path / "hub.yml").write_text(yaml.safe_dump(config))
    with Hub() as hub:
        environment = os.environ | hub.environment(tmp_path / "cache")
        for command in (
            ["hf", "upload", "me/metric", metrics[0]],
            ["mergekit-yaml", str(tmp_path / "hub.yml"), str(tmp_path / "hub")],
        ):
            done = subprocess.run(
                [str(Path(sys.executable).parent / command[0]), *command[1:]],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            assert done.returncode == 0, done.stdout + done.stderr
    found, expected = weights_of(tmp_path / "hub"), merge(fisher_config(models, metrics)).weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_error_without_words_has_a_name():
    assert first_line(ValueError("\n  a\nb")) == "a"
    assert first_line(AssertionError()) == "AssertionError"


def test_a_permuted_vocabulary_is_refused(merge, tmp_path):
    models = [llama(tmp_path / f"v{seed}", seed, extra_words=seed) for seed in range(2)]
    for model in models:
        shutil.copytree(model, f"{model}-metric")
    config = fisher_config(models, [f"{model}-metric" for model in models])
    outcome = merge(config | {"tokenizer": {"source": "union"}})
    assert (outcome.exit_code, "a metric cannot follow" in outcome.output) == (1, True)


def test_in_python_the_method_sends_you_to_the_function():
    from mergekit.merge_methods import merge_state_dicts

    with pytest.raises(KarcherError, match=r"call mergekit_karcher\.fisher_mean"):
        merge_state_dicts([{"w": torch.ones(2)}] * 2, "fisher", parameters={"metric": "x"})
