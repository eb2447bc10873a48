"""Quantised checkpoints: read as what they stand for, or refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from configs import config_for
from conftest import assert_error, weights_of
from inputs import mean_of
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from mergekit_karcher.host.quantised import dequantised


def quantised(path, folder, quantise, **settings):
    """A copy of a model whose projections are quantised; settings go into its config."""
    shutil.copytree(path, folder)
    tensors = {}
    for name, tensor in weights_of(path).items():
        tensors |= quantise(name, tensor.float()) if "proj" in name else {name: tensor}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return str(folder)


def fp8_blocks(rows, columns):
    def quantise(name, tensor):
        result, scales = tensor.clone(), []
        for row in range(0, tensor.shape[0], rows):
            scales.append([])
            for column in range(0, tensor.shape[1], columns):
                place = (slice(row, row + rows), slice(column, column + columns))
                scales[-1].append(tensor[place].abs().max() / 448)
                result[place] = tensor[place] / scales[-1][-1]
        return {
            name: result.to(torch.float8_e4m3fn),
            name + "_scale_inv": torch.tensor(scales),
        }

    return quantise


def fp8_rows(name, tensor):
    scales = tensor.abs().amax(1, keepdim=True) / 448
    return {name: (tensor / scales).to(torch.float8_e4m3fn), name + "_scale": scales}


def fp8_whole(name, tensor):
    scale = tensor.abs().max() / 448
    return {
        name: (tensor / scale).to(torch.float8_e4m3fn),
        name + "_scale": scale,
        name.removesuffix("weight") + "input_scale": torch.tensor(0.5),
    }


FP8 = {
    # Blocks that do not divide the shapes, (16 or 32 or 48) x (32 or 48).
    "blocks": (fp8_blocks(20, 24), {"weight_block_size": [20, 24]}),
    "rows": (fp8_rows, {}),
    "whole": (fp8_whole, {}),
}


@pytest.mark.parametrize(("quantise", "settings"), FP8.values(), ids=FP8)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_float8_with_scales_is_read_as_its_weights(
    three_models, merge, cli, tmp_path, quantise, settings, dtype
):
    claims = {"quantization_config": {"quant_method": "fp8"} | settings}
    paths = [
        quantised(path, tmp_path / str(index), quantise, **claims)
        for index, path in enumerate(three_models[:2])
    ]
    config = config_for(paths) | {"dtype": dtype}
    outcome = merge(config)
    for name, result in outcome.weights.items():
        expected = mean_of([weights_of(path)[name] for path in three_models[:2]])
        # float8 has 3 bits, so a relative error of 1/16; its mean has less.
        assert (result.double() - expected).norm() < 0.06 * expected.norm(), name
        assert result.dtype is getattr(torch, dtype)
    assert "quantization_config" not in json.loads((outcome.out / "config.json").read_text())
    model, info = LlamaForCausalLM.from_pretrained(outcome.out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype is getattr(torch, dtype)
    assert cli("report", config=config).exit_code == 0


def test_scales_of_blocks_may_be_as_many_as_there_are_rows():
    """A layer of DeepSeek-V3 has 7168 rows and 56 x 128 blocks, which is 7168."""
    quantise = fp8_blocks(8, 8)
    weight, scales = quantise("w", torch.randn(32, 64)).values()
    assert scales.numel() == 32
    whole = scales.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(dequantised(weight, scales, (8, 8)), weight.float() * whole)


def test_a_parameter_that_is_called_like_a_scale_is_a_parameter(merge, cli, tmp_path):
    paths = [str(tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    for path in paths:
        save_file({"norm.scales": torch.rand(3), "gate_blocks": torch.rand(3, 2)}, path)
    merged = merge(config_for(paths), command="mergekit-pytorch").weights
    assert merged.keys() == {"norm.scales", "gate_blocks"}
    assert cli("report", config=config_for(paths)).exit_code == 0


def test_float8_is_multiplied_by_its_scales_exactly(three_models, merge, tmp_path):
    """Of one model the mean is the model: q s, in one rounding."""
    path = quantised(
        three_models[0],
        tmp_path / "q",
        fp8_blocks(20, 24),
        quantization_config={"quant_method": "fp8", "weight_block_size": [20, 24]},
    )
    merged = merge(config_for([path])).weights
    tensors = weights_of(path)
    for name in (n for n in merged if "proj" in n):
        q, scales = tensors[name].double(), tensors[name + "_scale_inv"].double()
        for row, column in np.ndindex(*q.shape):
            q[row, column] *= scales[row // 20, column // 24]
        torch.testing.assert_close(merged[name].double(), q, rtol=2**-23, atol=0)


def four_bits(name, tensor):
    return {
        name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8),
        name + ".absmax": torch.rand(tensor.numel() // 64 + 1),
        name + ".quant_map": torch.linspace(-1, 1, 16),
    }


def int8_rows(name, tensor):
    scale = tensor.abs().amax(1) / 127
    return {name: (tensor / scale[:, None]).round().to(torch.int8), name + "_scale": scale}


def bitsandbytes_int8(name, tensor):
    packed = int8_rows(name, tensor)
    return {name: packed[name], name.removesuffix("weight") + "SCB": packed[name + "_scale"]}


def gptq(name, tensor):
    stem = name.removesuffix("weight")
    shape = (tensor.shape[1] // 8, tensor.shape[0])
    return {
        stem + "qweight": torch.ones(shape, dtype=torch.int32),
        stem + "scales": torch.rand(1, tensor.shape[0]),
    }


def mxfp4(name, tensor):
    return {
        name + "_blocks": torch.zeros(tensor.shape[0], tensor.shape[1] // 2, dtype=torch.uint8),
        name + "_scales": torch.zeros(tensor.shape[0], 1, dtype=torch.uint8),
    }


def wrong_blocks(name, tensor):
    return {name: tensor.to(torch.float8_e4m3fn), name + "_scale_inv": torch.ones(5, 7)}


QUANTISERS = {
    four_bits: ("bitsandbytes", "save model.dequantize()"),
    int8_rows: ("some-method", "merge the model that it was made from"),
    bitsandbytes_int8: ("bitsandbytes", "save model.dequantize()"),
    gptq: ("gptq", "merge the model that it was made from"),
    mxfp4: ("mxfp4", "Mxfp4Config(dequantize=True)"),
    wrong_blocks: ("fp8", "merge the model that it was made from"),
}


@pytest.mark.parametrize("quantise", QUANTISERS)
@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_other_quantisations_are_refused(three_models, merge, cli, tmp_path, quantise, dtype):
    method, remedy = QUANTISERS[quantise]
    claims = {"quantization_config": {"quant_method": method}}
    path = quantised(three_models[1], tmp_path / "q", quantise, **claims)
    config = config_for([three_models[0], path]) | {"dtype": dtype}
    words = [f"{path} is quantised by {method}", remedy]
    assert_error(merge(config), *words)
    assert_error(cli("report", config=config), *words)
    assert_error(cli("align", path, three_models[0], "--out", tmp_path / "aligned"), *words)
