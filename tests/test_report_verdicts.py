"""What the verdict says of models whose geometry is known."""

from __future__ import annotations

import math

import pytest
import torch
from configs import config_for
from reports import report_of
from safetensors.torch import save_file

VERDICTS = {
    "equal": "These two models are the same",
    "close": "karcher gives practically the same as linear",
    "unrelated": "are unrelated: their weights are",
    "noise": "no merge around the base can tell them from noise",
    "antipodal": "could not be proven unique: layer.weight",
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts(case, cli, tmp_path):
    generator = torch.Generator().manual_seed(3)
    base, *noise = torch.randn(4, 300, 200, generator=generator)
    if case == "equal":
        tensors = [base, base]
    elif case == "close":
        tensors = [base + 1e-3 * n for n in noise]
    elif case == "unrelated":
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
    config = config_for(models, out_dtype="bfloat16", **(around if case == "noise" else {}))
    report = report_of(cli("report", "--json", config=config))
    said = {other for other, words in VERDICTS.items() if words in report.verdict}
    assert said == {case} | {"antipodal": {"unrelated"}}.get(case, set())


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
    said = (
        "Their changes from the base are 90 degrees apart: averaging keeps 57.7 % of their length"
    )
    assert said in report.verdict


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
    far = math.degrees(report.tensors[0].angles[0][1])
    assert report.overall.task_angle_average == pytest.approx(report.tensors[0].angles[0][1])
    assert not report.overall.task_is_noise
    said = (
        f"The changes that all models but near.safetensors made to the base are {far:.3g} degrees"
    )
    assert said in report.verdict
    assert "averaging keeps" not in report.verdict
    shares = report.whole_rounding
    assert max(shares[:2]) < 0.1 < 0.7 < shares[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bf16_files_are_not_told_apart_below_their_own_rounding(dtype, cli, tmp_path):
    """Rounded to float32, the result of float32 files shows a difference that bf16 files hide."""
    generator = torch.Generator().manual_seed(3)
    base, noise = torch.randn(2, 300, 200, generator=generator)
    files = []
    for index, tensor in enumerate([base, base + 0.05 * noise]):
        files.append(str(tmp_path / f"m{index}.safetensors"))
        save_file({"layer.weight": tensor.to(dtype)}, files[-1])
    report = report_of(cli("report", "--json", config=config_for(files, [1, 3])))
    assert (report.tensors[0].linear_gap < 1) == (dtype == torch.bfloat16)
    # A difference that nobody notices is none, however small the rounding is beside it.
    assert "karcher gives practically the same as linear. They are" in report.verdict
    assert "rounding" not in report.verdict


def test_the_sphere_of_averagings_length_keeps_no_more(close_models, cli):
    base, *models = close_models
    config = config_for(models, base=base, origin="base", magnitude="linear")
    assert (
        "of their length, and origin: base keeps no more."
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


def test_a_difference_counts_by_the_size_of_its_tensor(cli, tmp_path):
    """Two biases of tiny norm point in different directions; everything else is the same."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(300, 200, generator=generator)
    files = []
    for index in range(2):
        tensors = {"layer.weight": weight + 1e-4 * index, "layer.bias": torch.zeros(2)}
        tensors["layer.bias"][index] = 1e-9
        files.append(str(tmp_path / f"m{index}.safetensors"))
        save_file(tensors, files[-1])
    config = config_for(files)
    del config["dtype"]
    verdict = report_of(cli("report", "--json", config=config)).verdict
    assert verdict.startswith(
        "For these two models, karcher gives practically the same as linear except in layer.bias, "
        "with 0.0033 % of the parameters. They are "
    )
    assert " degrees apart on average, 90 at most (in layer.bias)" in verdict
    assert "e+" not in verdict
    assert "output" not in verdict


def test_what_differs_is_told_with_its_part_of_the_model(cli, tmp_path):
    """One of two equal tensors differs: at right angles averaging loses 1 - 1/sqrt(2)."""
    files = []
    for index in range(2):
        tensor = torch.zeros(4, 6)
        tensor[index] = 1
        files.append(str(tmp_path / f"m{index}.safetensors"))
        save_file({"a.weight": torch.ones(4, 6), "b.weight": tensor}, files[-1])
    report = report_of(cli("report", "--json", config=config_for(files)))
    said = "give different weights in 50 % of the parameters (most in b.weight), by 29.3 % of their"
    assert said in report.verdict
    assert report.overall.linear_length_average == pytest.approx((1 + 0.5**0.5) / 2)
    assert report.verdict.endswith("and plain averaging loses 14.6 % of their length.")
