"""The report against plain sums over the weights, from the command and from the merge itself."""

from __future__ import annotations

import builtins
import json
import math
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import llama, weights_of
from inputs import ambient_mean
from safetensors.torch import save_file
from test_spheres import WIDE, angle, norm

from mergekit_karcher.cli.main import main
from mergekit_karcher.report.kinds import kind_of, layer_of
from mergekit_karcher.report.names import is_local, short_names
from mergekit_karcher.report.schema import Report


@pytest.fixture(scope="module")
def close_models(tmp_path_factory):
    """A base and three models near it, in float32: task vectors of 2 % in random directions."""
    folder = tmp_path_factory.mktemp("close")
    base = llama(folder / "base", 0, dtype=torch.float32)
    paths = [base]
    for seed in range(1, 4):
        path = Path(shutil.copytree(base, folder / f"tune{seed}"))
        generator = torch.Generator().manual_seed(seed)
        for file in path.glob("*.safetensors"):
            tensors = {
                name: t
                + 0.02 * t.std(correction=0) * torch.randn(t.shape, generator=generator)
                + (0.01 * torch.randn(t.shape, generator=generator) if t.ndim == 1 else 0)
                for name, t in weights_of_file(file).items()
            }
            save_file(tensors, file, metadata={"format": "pt"})
        paths.append(str(path))
    return paths


def weights_of_file(path):
    from safetensors.torch import load_file

    return load_file(path)


def config_for(models, weights=None, base=None, **parameters):
    weights = weights or [1] * len(models)
    config = {
        "merge_method": "karcher",
        "models": [
            {"model": model, "parameters": {"weight": weight}}
            for model, weight in zip(models, weights, strict=True)
        ],
        "parameters": parameters,
        "dtype": "float32",
    }
    return config | ({} if base is None else {"base_model": base})


@pytest.fixture
def cli(tmp_path):
    """Run our command; returns click's result."""

    def run(*arguments, config=None, **environment):
        arguments = [str(argument) for argument in arguments]
        if config is not None:
            path = tmp_path / "report.yml"
            path.write_text(yaml.safe_dump(config))
            arguments.insert(1, str(path))
        return CliRunner().invoke(main, arguments, env=environment)

    return run


def report_of(result):
    assert result.exit_code == 0, result.output
    return Report.model_validate_json(result.stdout)


def vectors_of(models, name):
    return [weights_of(model)[name].double().numpy().ravel() for model in models]


def close(found, expected, **tolerance):
    """Nested lists with None for NaN."""
    array = np.array(found, dtype=float)
    np.testing.assert_allclose(array, np.array(expected, dtype=float), **tolerance)


def pairwise(vectors):
    return [[angle(p, q) for q in vectors] for p in vectors]


@pytest.mark.parametrize("origin", ["zero", "base"])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, 1, 3]])
def test_every_number_of_a_tensor(close_models, cli, origin, weights):
    base, *models = close_models
    config = config_for(models, weights, base if origin == "base" else None, origin=origin)
    report = report_of(cli("report", "--json", config=config))
    assert report.schema_ == "mergekit-karcher/report/1"
    assert {t.name for t in report.tensors} == set(weights_of(base))
    shares = np.array(weights) / np.sum(weights)
    for tensor in report.tensors:
        plain = vectors_of(models, tensor.name)
        start = vectors_of([base], tensor.name)[0] if origin == "base" else 0 * plain[0]
        vectors = [np.asarray(v, WIDE) - start for v in plain]
        count = len(models)
        assert tensor.shape == list(weights_of(base)[tensor.name].shape)
        assert (tensor.origin, tensor.granularity) == (origin, "tensor")
        norms = np.array([float(norm(v)) for v in vectors])
        close(tensor.norms[:count], norms, rtol=1e-7)
        close([row[:count] for row in tensor.angles[:count]], pairwise(vectors), atol=1e-7)
        linear = sum(w * v for w, v in zip(shares, vectors, strict=True))
        assert tensor.linear_length == pytest.approx(float(norm(linear)) / (shares @ norms))
        mean = ambient_mean([v.astype(float) for v in vectors], weights)
        found = sum(k * v for k, v in zip(tensor.coefficients, vectors, strict=False))
        np.testing.assert_allclose(found.astype(float), mean, atol=1e-7 * norms.max())
        to_mean = [angle(v, mean) for v in vectors]
        close(tensor.angles_to_mean[:count], to_mean, rtol=1e-5, atol=1e-9)
        spread = math.sqrt(shares @ np.square(to_mean))
        assert tensor.spread == pytest.approx(spread, rel=1e-5)
        assert tensor.unique
        assert tensor.status == "converged"
        length = shares @ norms
        gap = norm(mean / norm(mean) - linear / norm(linear)) * length
        rounding = 2**-24 * 0.425 * (shares @ [float(norm(v)) for v in plain])
        assert tensor.linear_gap == pytest.approx(float(gap) / rounding, rel=1e-2, abs=1e-2)
        if origin == "base":
            other = tensor.other
            assert other.origin == "zero"
            close(other.norms, [float(norm(v)) for v in [*plain, start]], rtol=1e-12)
            close(other.angles, pairwise([*plain, start]), rtol=1e-6, atol=1e-9)
            noise = [
                2**-24 * 0.425 * norm(p) / norm(v) for p, v in zip(plain, vectors, strict=True)
            ]
            if tensor.kind != "norms":
                close(tensor.rounding[:count], noise, rtol=1e-6)
            assert tensor.coefficients[count] is None


def test_the_whole_model_and_the_kinds(close_models, cli):
    base, *models = close_models
    config = config_for(models, base=base, origin="base")
    report = report_of(cli("report", "--json", config=config))
    names = sorted(weights_of(base))

    def flat(path):
        return np.concatenate([v for name in names for v in vectors_of([path], name)])

    whole = [flat(path) for path in [*models, base]]
    close(report.whole.angles, pairwise(whole), rtol=1e-6, atol=1e-9)
    tasks = [np.asarray(v, WIDE) - whole[-1] for v in whole[:-1]]
    close([row[:3] for row in report.whole_tasks.angles[:3]], pairwise(tasks), atol=1e-6)
    kept = norm(sum(tasks)) / sum(norm(t) for t in tasks)
    assert report.whole_tasks.linear_length == pytest.approx(float(kept), rel=1e-6)
    kinds = {kind.kind: kind for kind in report.kinds}
    assert set(kinds) == {"embeddings", "norms", "q", "k", "v", "o", "gate", "up", "down", "head"}
    up = kinds["up"]
    angles, task_angles, lengths = [], [], []
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        own, start = vectors_of(models, name), vectors_of([base], name)[0]
        angles += [angle(p, q) for p, q in combinations(own, 2)]
        task_angles += [angle(p - start, q - start) for p, q in combinations(own, 2)]
        lengths.append(float(norm(sum(own)) / sum(norm(v) for v in own)))
    assert up.tensors == 3
    assert up.angle_median == pytest.approx(np.median(angles), rel=1e-6)
    assert up.angle_largest == pytest.approx(max(angles), rel=1e-6)
    assert up.task_angle_median == pytest.approx(np.median(task_angles), rel=1e-5)
    assert up.linear_length_median == pytest.approx(np.median(lengths), rel=1e-9)
    assert up.not_unique == 0


@pytest.mark.parametrize("granularity", ["tensor", "row", "model"])
@pytest.mark.parametrize("origin", ["zero", "base"])
def test_a_merge_writes_the_same_report_and_the_same_weights(
    close_models, cli, merge, tmp_path, monkeypatch, granularity, origin
):
    base, *models = close_models
    config = config_for(models, [1, 2, 1], base, origin=origin, granularity=granularity)
    plain = merge(config, name="plain").weights
    monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(tmp_path / "seen"))
    for name, tensor in merge(config, name="watched").weights.items():
        assert torch.equal(tensor, plain[name]), name
    monkeypatch.delenv("MERGEKIT_KARCHER_REPORT")
    written = json.loads((tmp_path / "seen" / "report.json").read_text())
    asked = cli("report", "--json", config=config)
    assert written == json.loads(asked.stdout)
    assert (tmp_path / "seen" / "report.md").is_file()
    assert (tmp_path / "seen" / "angles.png").is_file()
    tensors = {tensor["name"]: tensor for tensor in written["tensors"]}
    assert set(tensors) == set(plain)
    one = tensors["model.layers.0.mlp.up_proj.weight"]
    if granularity == "row":
        assert one["coefficients"] is None
        assert one["linear_gap"] is None
    else:
        k = [value for value in one["coefficients"] if value is not None]
        own = models if origin == "base" else [*models, base]
        inputs = [weights_of(model)[one["name"]].double() for model in own]
        start = weights_of(base)[one["name"]].double() if origin == "base" else 0 * inputs[0]
        again = start + sum(c * (w - start) for c, w in zip(k, inputs, strict=True))
        torch.testing.assert_close(again.float(), plain[one["name"]], rtol=0, atol=1e-7)
    if granularity == "model":
        assert len({tuple(t["coefficients"]) for t in written["tensors"]}) == 1


def test_a_base_that_takes_part_shows_task_vectors_too(close_models, cli):
    base, *models = close_models
    report = report_of(cli("report", "--json", config=config_for(models, base=base)))
    names = [model.name for model in report.models]
    assert names == ["tune1", "tune2", "tune3", "base"]
    assert [model.is_base for model in report.models] == [False, False, False, True]
    around = report_of(cli("report", "--json", config=config_for(models, base=base, origin="base")))
    for own, other in zip(report.tensors, around.tensors, strict=True):
        assert own.origin == "zero"
        close(
            [row[:3] for row in own.other.angles[:3]],
            [row[:3] for row in other.angles[:3]],
            atol=2e-5,
        )
        close(own.other.norms[:3], other.norms[:3], rtol=1e-6)
        assert own.other.norms[3] is None


def test_the_config_of_another_method_is_seen_as_karcher_would(close_models, cli):
    base, *models = close_models
    config = config_for(models, [1, 2, 3], base, density=0.5, normalize=True)
    config["merge_method"] = "ties"
    config["models"][0]["parameters"]["density"] = 0.2
    report = report_of(cli("report", "--json", config=config))
    assert report.settings.merge_method == "ties"
    assert report.settings.origin == ["base"]
    assert report.verdict.startswith("The config asks for ties; ")
    same = config_for(models, [1, 2, 3], base, origin="base")
    expected = report_of(cli("report", "--json", config=same))
    assert [t.coefficients for t in report.tensors] == [t.coefficients for t in expected.tensors]


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


def test_weights_of_zero_leave_a_model_out_where_they_stand(close_models, cli):
    weight = [{"filter": "mlp", "value": 0}, {"value": 1}]
    models = close_models[1:]
    report = report_of(cli("report", "--json", config=config_for(models, [1, weight, 1])))
    for tensor in report.tensors:
        there = [norm is not None for norm in tensor.norms]
        assert there == [True, "mlp" not in tensor.name, True]


def test_a_merge_with_a_model_of_weight_zero_reports_the_others(
    close_models, cli, merge, tmp_path, monkeypatch
):
    config = config_for(close_models[1:], [1, 0, 2])
    monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(tmp_path / "seen"))
    assert merge(config).weights
    monkeypatch.delenv("MERGEKIT_KARCHER_REPORT")
    written = json.loads((tmp_path / "seen" / "report.json").read_text())
    assert written == json.loads(cli("report", "--json", config=config).stdout)
    assert written["tensors"][0]["coefficients"][1] is None
    assert written["verdict"].startswith("These two models are ")


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


def test_files_and_the_terminal(close_models, cli, tmp_path):
    base, *models = close_models
    out = tmp_path / "deep" / "geometry"
    config = config_for(models, base=base, origin="base")
    result = cli("report", "--out", out, config=config)
    assert result.exit_code == 0, result.output
    report = Report.model_validate_json((out / "report.json").read_text())
    words = " ".join(result.stdout.split())
    assert report.verdict in words
    assert "\x1b" not in result.stdout
    for heading in ("angle", "spread", "not unique", "task angle", "kept, %"):
        assert heading in words
    text = (out / "report.md").read_text()
    assert report.verdict in text
    for picture in ("angles.png", "models.png", "lengths.png"):
        assert f"]({picture})" in text
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in text + (out / "report.json").read_text()
    quiet = cli("report", "--quiet", "--out", out, config=config)
    assert quiet.stderr == ""
    assert quiet.stdout == result.stdout


def test_without_matplotlib_the_text_is_written(close_models, cli, tmp_path, monkeypatch, merge):
    true_import = builtins.__import__

    def no_matplotlib(name, *rest, **named):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return true_import(name, *rest, **named)

    config = config_for(close_models[1:])
    assert cli("report", "--out", tmp_path / "seen", config=config).exit_code == 0
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    result = cli("report", "--out", tmp_path / "seen", config=config)
    assert result.exit_code == 0
    assert "pip install 'mergekit-karcher[report]'" in result.stderr
    assert (tmp_path / "seen" / "report.json").is_file()
    assert not list((tmp_path / "seen").glob("*.png"))
    assert "![" not in (tmp_path / "seen" / "report.md").read_text()


def test_stages_get_folders_of_their_own(close_models, merge, tmp_path, monkeypatch):
    monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(tmp_path / "seen"))
    first = config_for(close_models[1:3]) | {"name": "pair"}
    second = config_for(["pair", close_models[3]])
    outcome = merge([first, second], command="mergekit-multi")
    assert outcome.weights
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == ["merged", "pair"]
    assert (tmp_path / "seen" / "merged" / "report.json").is_file()


def test_a_folder_that_cannot_be_made_stops_the_merge_before_it_starts(
    close_models, merge, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(tmp_path / "file" / "seen"))
    outcome = merge(config_for(close_models[1:]))
    assert outcome.exit_code == 1
    assert "The report cannot be written to" in outcome.output
    assert not outcome.out.exists()


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_report_that_cannot_be_written_in_the_end_leaves_the_merge_whole(
    close_models, merge, tmp_path, monkeypatch, caplog, kind
):
    def full(*_):
        raise kind("No space left on device")

    monkeypatch.setattr("mergekit_karcher.host.report_task.write", full)
    monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(tmp_path / "seen"))
    outcome = merge(config_for(close_models[1:]))
    assert outcome.weights
    assert (outcome.out / "config.json").is_file()
    assert "The report was not written to" in caplog.text
    assert "No space left" in caplog.text


VERDICTS = {
    "equal": "These two models are the same",
    "close": "give the same weights to within bfloat16 rounding",
    "strangers": "like strangers: plain averaging keeps",
    "noise": "no merge around the base can tell them from noise",
    "antipodal": "no mean that is certainly unique: layer.weight",
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts(case, cli, tmp_path):
    generator = torch.Generator().manual_seed(3)
    base, *noise = torch.randn(4, 300, 200, generator=generator)
    if case == "equal":
        tensors = [base, base]
    elif case == "close":
        tensors = [base + 1e-3 * n for n in noise]
    elif case == "strangers":
        tensors = noise
    elif case == "noise":
        tensors = [(base.bfloat16().float() + 1e-4 * n).bfloat16() for n in noise]
    else:
        tensors = [base, -base, noise[0] / 50 - base]
    for index, tensor in enumerate(tensors):
        save_file({"layer.weight": tensor}, tmp_path / f"m{index}.safetensors")
    save_file({"layer.weight": base.bfloat16().float()}, tmp_path / "base.safetensors")
    models = [str(tmp_path / f"m{index}.safetensors") for index in range(len(tensors))]
    around = {"base": str(tmp_path / "base.safetensors"), "origin": "base"}
    config = config_for(models, **(around if case == "noise" else {}))
    config["out_dtype"] = "bfloat16"
    report = report_of(cli("report", "--json", config=config))
    said = {other for other, words in VERDICTS.items() if words in report.verdict}
    assert said == {case} | {"noise": {"close"}, "antipodal": {"strangers"}}.get(case, set())


def test_the_length_that_averaging_loses_is_what_the_verdict_says(cli, tmp_path):
    """Three orthogonal task vectors keep 1/sqrt(3)."""
    base = torch.zeros(4, 6)
    base[3] = 100
    for index in range(3):
        tensor = base.clone()
        tensor[index] += 1
        save_file({"layer.weight": tensor}, tmp_path / f"m{index}.safetensors")
    save_file({"layer.weight": base}, tmp_path / "base.safetensors")
    models = [str(tmp_path / f"m{index}.safetensors") for index in range(3)]
    config = config_for(models, base=str(tmp_path / "base.safetensors"), origin="base")
    report = report_of(cli("report", "--json", config=config))
    assert "Their task vectors are 90 degrees apart on average: averaging keeps 58 % of their " in (
        report.verdict
    )


def test_weights_by_filter_give_the_lengths_of_what_is_merged(close_models, cli):
    base, first, second, _ = close_models
    weights = [[{"filter": "norm", "value": 0.01}, {"value": 1}], 1]
    report = report_of(cli("report", "--json", config=config_for([first, second], weights)))
    merged = means = 0.0
    for name in weights_of(base):
        shares = np.array([0.01, 1] if "norm" in name else [1, 1])
        shares = shares / shares.sum()
        vectors = vectors_of([first, second], name)
        merged += float(norm(shares @ np.array(vectors)) ** 2)
        means += float(shares @ [norm(v) for v in vectors]) ** 2
    assert report.whole.linear_length == pytest.approx(math.sqrt(merged / means), rel=1e-9)


def test_one_model_that_is_noise_is_named_and_left_out(cli, tmp_path):
    generator = torch.Generator().manual_seed(3)
    base, *noise = torch.randn(4, 300, 200, generator=generator)
    base = base.bfloat16().float()
    tensors = {
        "far": base + noise[0] / 5,
        "off": base + noise[1] / 5,
        "near": base + noise[2] / 2e3,
    }
    for name, tensor in tensors.items():
        save_file({"layer.weight": tensor.bfloat16()}, tmp_path / f"{name}.safetensors")
    save_file({"layer.weight": base}, tmp_path / "base.safetensors")
    models = [str(tmp_path / f"{name}.safetensors") for name in tensors]
    config = config_for(models, base=str(tmp_path / "base.safetensors"), origin="base")
    report = report_of(cli("report", "--json", config=config))
    assert "of the models but near.safetensors are 90 degrees apart" in report.verdict
    assert "averaging keeps" not in report.verdict
    shares = report.whole_rounding
    assert max(shares[:2]) < 0.1 < 0.7 < shares[2]


def test_bf16_files_are_not_told_apart_below_their_own_rounding(cli, tmp_path):
    generator = torch.Generator().manual_seed(3)
    base, noise = torch.randn(2, 300, 200, generator=generator)
    files = []
    for index, tensor in enumerate([base, base + 1e-3 * noise]):
        files.append(str(tmp_path / f"m{index}.safetensors"))
        save_file({"layer.weight": tensor.bfloat16()}, files[-1])
    report = report_of(cli("report", "--json", config=config_for(files)))
    assert report.tensors[0].linear_gap < 1
    assert "the same weights to within" in report.verdict


def test_the_sphere_of_averagings_length_keeps_no_more(close_models, cli):
    base, *models = close_models
    config = config_for(models, base=base, origin="base", magnitude="linear")
    assert (
        "of their length, origin: base no more."
        in report_of(cli("report", "--json", config=config)).verdict
    )


def test_a_model_and_its_double_are_not_the_same(cli, tmp_path):
    tensor = torch.randn(20, 30)
    for index in (1, 2):
        save_file({"a.weight": index * tensor}, tmp_path / f"m{index}.safetensors")
    files = [str(tmp_path / f"m{index}.safetensors") for index in (1, 2)]
    report = report_of(cli("report", "--json", config=config_for(files)))
    assert report.whole.angles[0][1] == 0
    assert "are the same" not in report.verdict


OTHERS = {
    "negative weights": ("task_arithmetic", [1, -0.5], {"weight": 1}),
    "zero weights": ("linear", [0, 0], {}),
    "dict references": ("linear", [1, 1], {}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_ordinary_configs_of_other_methods_are_reported_on(case, close_models, cli):
    method, weights, parameters = OTHERS[case]
    base, *models = close_models
    config = config_for(models[:2], weights, base if method == "task_arithmetic" else None)
    config |= {"merge_method": method, "parameters": parameters}
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
            {"sources": [{"model": m, "layer_range": [start, end]} for m, start, end in own]}
            for own in slices
        ],
        "dtype": "float32",
    }
    report = report_of(cli("report", "--json", config=config))
    origins = {t.layer: t.origin for t in report.tensors if t.kind == "up"}
    assert origins == {0: "base", 1: "base", 2: "zero"}


def test_another_method_with_the_variable_set_is_warned_of(
    close_models, merge, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(tmp_path / "seen"))
    config = config_for(close_models[1:3]) | {"merge_method": "linear"}
    assert merge(config).weights
    assert "only merges by karcher write a report" in caplog.text
    assert not (tmp_path / "seen").exists()


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "q", 11),
        ("model.layers.0.self_attn.q_norm.weight", "norms", 0),
        ("model.layers.3.mlp.gate_proj.weight", "gate", 3),
        ("model.layers.3.mlp.experts.7.down_proj.weight", "down", 3),
        ("model.layers.3.block_sparse_moe.gate.weight", "router", 3),
        ("model.layers.3.block_sparse_moe.experts.1.w1.weight", "gate", 3),
        ("model.layers.2.self_attn.k_proj.bias", "biases", 2),
        ("model.embed_tokens.weight", "embeddings", None),
        ("lm_head.weight", "head", None),
        ("model.norm.weight", "norms", None),
        ("transformer.h.4.attn.c_attn.weight", "qkv", 4),
        ("transformer.h.4.attn.c_proj.weight", "o", 4),
        ("transformer.h.4.mlp.c_proj.weight", "down", 4),
        ("transformer.wte.weight", "embeddings", None),
        ("transformer.h.4.ln_1.bias", "norms", 4),
        ("gpt_neox.layers.5.attention.query_key_value.weight", "qkv", 5),
        ("gpt_neox.layers.5.attention.dense.weight", "o", 5),
        ("gpt_neox.layers.5.mlp.dense_4h_to_h.weight", "down", 5),
        ("bert.encoder.layer.1.attention.self.query.weight", "q", 1),
        ("bert.encoder.layer.1.attention.output.dense.weight", "o", 1),
        ("bert.encoder.layer.1.intermediate.dense.weight", "up", 1),
        ("bert.encoder.layer.1.output.dense.weight", "down", 1),
        ("0.weight", "other", 0),
    ],
)
def test_kinds_and_layers(name, kind, layer):
    assert kind_of(name) == kind
    assert layer_of(name) == layer


def test_names_show_no_place_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    paths = ["/data/a/last", "/data/b/last", "me/tuned", "runs/mine", "me/tuned+/x/adapter", "./z"]
    paths.append("gone/since/then")
    assert short_names(paths, is_local) == {
        "/data/a/last": "a/last",
        "/data/b/last": "b/last",
        "me/tuned": "me/tuned",
        "runs/mine": "mine",
        "me/tuned+/x/adapter": "me/tuned+adapter",
        "./z": "z",
        "gone/since/then": "then",
    }


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
    result = cli("report", config=config_for(close_models[1:], wieght=2))
    assert (result.exit_code, "did you mean weight?" in result.stderr) == (1, True)
    single = cli("report", "--quiet", config=config_for(close_models[1:2]))
    assert (single.exit_code, "nothing to compare" in single.stderr) == (1, True)
