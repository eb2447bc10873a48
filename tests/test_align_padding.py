"""Models of different widths: zeros change nothing, and where they would, align refuses."""

from __future__ import annotations

import json

import planted
import pytest
import torch
import yaml
from planted import align_stacks, run_align, shapes_of
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_narrower_mlps_are_filled_up_with_neurons_that_do_nothing(family, tmp_path):
    key = {"gpt2": "n_inner"}.get(family, "intermediate_size")
    narrow = planted.hf_model(family)
    wide_config = planted.HF[family]().config
    setattr(wide_config, key, (getattr(wide_config, key) or 96) + 11)
    torch.manual_seed(9)
    wide = type(narrow)(wide_config).double().eval()
    expected = planted.logits(narrow, planted.state_of(narrow))
    for name, model in (("narrow", narrow), ("wide", wide)):
        model.save_pretrained(tmp_path / name)
    out = tmp_path / "aligned"
    refused = run_align(tmp_path / "wide", tmp_path / "narrow", "--out", out)
    assert (refused.exit_code, "--pad fills" in refused.stderr) == (1, True)
    result = run_align(tmp_path / "wide", tmp_path / "narrow", "--out", out, "--pad")
    assert result.exit_code == 0, result.output
    written = json.loads((out / "narrow" / "config.json").read_text())
    assert written[key] == getattr(wide_config, key)
    padded = type(narrow).from_pretrained(out / "narrow", dtype=torch.float64).eval()
    planted.in_float64(padded)
    torch.testing.assert_close(
        planted.logits(padded, padded.state_dict()), expected, rtol=1e-9, atol=1e-10
    )


def test_padded_models_merge_at_the_common_width(tmp_path, merge):
    narrow, wide = planted.mlp(0, (20, 16, 12, 5)), planted.mlp(1, (20, 18, 15, 5))
    save_file(narrow, tmp_path / "narrow.safetensors")
    save_file(wide, tmp_path / "wide.safetensors")
    files = [tmp_path / "wide.safetensors", tmp_path / "narrow.safetensors"]
    out = tmp_path / "aligned"
    assert align_stacks(*files, "--out", out, "--pad").exit_code == 0
    written = load_file(out / "narrow.safetensors")
    assert shapes_of(written) == shapes_of(wide)
    inputs = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(forward(written, inputs), forward(narrow, inputs))
    config = yaml.safe_load((out / "config.yml").read_text())
    merged = merge(config, command="mergekit-pytorch").weights
    assert shapes_of(merged) == shapes_of(wide)


def forward(state, x):
    for number in (0, 2, 4):
        x = x @ state[f"{number}.weight"].T + state[f"{number}.bias"]
        x = x.relu() if number < 4 else x
    return x


def test_what_cannot_be_padded_is_refused(tmp_path):
    for name, change in (("a", {}), ("b", {"hidden_size": 40}), ("c", {"num_key_value_heads": 2})):
        model = planted.HF["llama"]()
        for key, value in change.items():
            setattr(model.config, key, value)
        type(model)(model.config).save_pretrained(tmp_path / name)
    result = run_align(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "x", "--pad")
    assert result.exit_code == 1
    assert "zeros in the residual stream would change" in result.stderr
    result = run_align(tmp_path / "a", tmp_path / "c", "--out", tmp_path / "x", "--pad")
    assert "only plain MLPs can be padded with zeros" in result.stderr
