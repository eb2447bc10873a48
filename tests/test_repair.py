"""REPAIR: the hidden units of a merged network get the statistics of its parents'."""

from __future__ import annotations

import json
import shutil

import planted
import pytest
import small_models
import torch
from click.testing import CliRunner
from conftest import llama, weights_of
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3ForCausalLM,
)

from mergekit_karcher.align.calibration import Stack
from mergekit_karcher.align.repair import moments, reestimate, repair
from mergekit_karcher.cli.main import main
from mergekit_karcher.errors import KarcherError


def moments_of_hidden(state, inputs):
    """Mean and deviation of every pre-activation of the first two layers."""
    result = []
    x = inputs
    for number in (0, 2):
        x = x @ state[f"{number}.weight"].T + state[f"{number}.bias"]
        result.append((x.mean(0), x.std(0, correction=0)))
        x = x.relu()
    return result


def test_repair_gives_every_unit_the_moments_of_its_parents(tmp_path):
    """The definition: after it, mean and deviation are the means of the parents'."""
    parents = [{k: v.float() for k, v in planted.mlp(seed).items()} for seed in range(3)]
    merged = {k: sum(p[k] for p in parents) / 3 for k in parents[0]}
    inputs = torch.randn(200, 20)
    files = []
    for name, state in (("merged", merged), *((f"p{i}", p) for i, p in enumerate(parents))):
        files.append(tmp_path / f"{name}.safetensors")
        save_file(state, files[-1])
    save_file({"images": inputs}, tmp_path / "data.safetensors")
    out = tmp_path / "repaired.safetensors"
    arguments = [
        "repair",
        "--assume-stack",
        *files,
        "--data",
        tmp_path / "data.safetensors",
        "--out",
        out,
    ]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert "2 layers, 28 hidden units" in result.stderr
    reached = moments_of_hidden(load_file(out), inputs)
    wanted = [moments_of_hidden(parent, inputs) for parent in parents]
    for layer, (mean, deviation) in enumerate(reached):
        target = [torch.stack([w[layer][part] for w in wanted]).mean(0) for part in (0, 1)]
        torch.testing.assert_close(mean, target[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(deviation, target[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(load_file(out)["4.weight"], merged["4.weight"])
    again = CliRunner().invoke(main, [str(a) for a in arguments])
    assert (again.exit_code, "exists: name a place" in again.stderr) == (1, True)


def test_repair_of_a_network_by_itself_changes_nothing():
    net = planted.conv_net(0)
    images = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    corrections = repair(net, [net, net], lambda m: m(images), ["0", "3", "8"])
    for correction in corrections.values():
        torch.testing.assert_close(correction.scale, torch.ones_like(correction.scale))
        assert correction.shift.abs().max() < 1e-12


def test_units_that_do_not_vary_are_not_blown_up():
    state = {k: v.float() for k, v in planted.mlp(0).items()}
    dead = {k: v.clone() for k, v in state.items()}
    dead["0.weight"][3] = 0
    nets = [Stack(("0", "2", "4"), s) for s in (dead, state)]
    corrections = repair(nets[0], [nets[1]], lambda m: m(torch.randn(50, 20)), ["0", "2"])
    assert corrections["0"].scale[3] == 1
    assert all(torch.isfinite(c.scale).all() for c in corrections.values())


def test_batch_norms_are_taken_anew():
    net = planted.conv_net(0)
    images = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    reestimate(net, lambda m: m(images))
    with torch.no_grad():
        first = net[0](images)
    torch.testing.assert_close(net[1].running_mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(net[1].running_var, first.var((0, 2, 3)))
    assert not any(module.training for module in net if isinstance(module, torch.nn.BatchNorm2d))
    assert net[1].momentum == 0.1


def test_repair_of_a_language_model(three_models, merge, tmp_path):
    config = {"merge_method": "linear", "models": []}
    config["models"] = [{"model": m, "parameters": {"weight": 1}} for m in three_models]
    merged = merge(config).out
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 60}" for i in range(700)))
    out = tmp_path / "repaired"
    arguments = ["repair", merged, *three_models, "--data", text, "--out", out]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    before, after = weights_of(merged), weights_of(out)
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"gate_proj", "up_proj"}
    AutoModelForCausalLM.from_pretrained(out)
    text.write_text("w1")
    shutil.rmtree(out)
    short = CliRunner().invoke(main, [str(a) for a in arguments])
    assert (short.exit_code, "at least 64" in short.stderr) == (1, True)


def test_repair_of_what_lies_between_unknown_layers_is_refused(tmp_path):
    state = planted.conv_net(0).state_dict()
    save_file(state, tmp_path / "net.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "data.safetensors")
    arguments = [
        "repair",
        *[tmp_path / "net.safetensors"] * 2,
        "--data",
        tmp_path / "data.safetensors",
        "--out",
        tmp_path / "out.safetensors",
    ]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert (result.exit_code, "no stack of linear layers alone" in result.stderr) == (1, True)


def test_repair_of_a_bare_gpt2_finds_its_modules(tmp_path, three_models):
    """Its checkpoint has h.0.mlp..., the model that is run transformer.h.0.mlp..."""
    folders = []
    for seed in range(2):
        model = planted.hf_model("gpt2", seed).float()
        folders.append(tmp_path / f"g{seed}")
        model.transformer.save_pretrained(folders[-1])
        AutoTokenizer.from_pretrained(three_models[0]).save_pretrained(folders[-1])
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 50}" for i in range(100)))
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        config["n_positions"] = 64
        (folder / "config.json").write_text(json.dumps(config))
        state = weights_of(folder)
        state["wpe.weight"] = torch.randn(64, 24)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "repaired"
    arguments = ["repair", folders[0], *folders, "--data", text, "--out", out]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    before, after = weights_of(folders[0]), weights_of(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"h.{i}.mlp.c_fc.{part}" for i in (0, 1) for part in ("weight", "bias")}


def test_repair_writes_where_it_was_told(tmp_path):
    state = {k: v.float() for k, v in planted.mlp(0).items()}
    save_file(state, tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    torch.save(torch.randn(30, 20), tmp_path / "data.pt")
    arguments = ["repair", *[tmp_path / "m.safetensors"] * 2, "--data", tmp_path / "data.pt"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--out", str(tmp_path / "m.pt")])
    assert (result.exit_code, "must end in .safetensors" in result.stderr) == (1, True)
    assert (tmp_path / "m.safetensors").read_bytes() == before


def test_repair_in_batches_is_repair_at_once():
    """The statistics are those of all calls, also of batches of unequal sizes and unlike data."""
    parents = [planted.conv_net(seed) for seed in (1, 2)]
    merged = planted.conv_net(3)
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    images = torch.randn(24, 3, 8, 8, dtype=torch.float64)
    images[:5] += 3
    layers = ["0", "3", "8"]
    at_once = repair(merged, parents, lambda net: net(images), layers)
    batches = images.split([5, 12, 7])
    in_batches = repair(merged, parents, lambda net: [net(part) for part in batches], layers)
    assert list(in_batches) == layers
    for name, correction in at_once.items():
        torch.testing.assert_close(in_batches[name], correction, rtol=1e-9, atol=1e-11)
    planted.assert_equal_states(merged.state_dict(), before)
    assert not any(module._forward_hooks for module in merged.modules())


def test_moments_are_those_of_all_calls():
    net = planted.conv_net(0)
    images = torch.randn(9, 3, 8, 8, dtype=torch.float64)
    measured = moments(net, lambda m: [m(images[:2]), m(images[2:] - 5)], ["0"])["0"]
    with torch.no_grad():
        outputs = net[0](torch.cat([images[:2], images[2:] - 5])).movedim(1, 0).flatten(1)
    torch.testing.assert_close(measured.mean, outputs.mean(1))
    torch.testing.assert_close(measured.deviation, outputs.std(1, correction=0))


def test_a_layer_that_is_never_called_is_named():
    net = planted.conv_net(0)
    net.unused = torch.nn.Linear(2, 2)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(KarcherError, match="never called unused"):
        repair(net, [net], lambda m: m[0](images), ["0", "unused"])


def test_batch_norms_in_batches_get_the_statistics_of_all_values():
    """Weighted by the number of values; batches that differ add to the variance."""
    net = planted.conv_net(0)
    images = torch.randn(24, 3, 8, 8, dtype=torch.float64)
    images[:5] += 3
    reestimate(net, lambda m: [m(part) for part in images.split([5, 12, 7])])
    with torch.no_grad():
        first = net[0](images)
    torch.testing.assert_close(net[1].running_mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(net[1].running_var, first.var((0, 2, 3)))
    assert int(net[1].num_batches_tracked) == 3
    assert net[1].momentum == 0.1


def test_batch_norms_are_as_they_were_after_an_error():
    net = planted.conv_net(0)

    def broken(_):
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        reestimate(net, broken)
    assert (net[1].momentum, net[1].training, len(net[1]._forward_hooks)) == (0.1, False, 0)


NO_TENSORS = {
    "text": (lambda path: path.write_text("no tensor"), "data.pt"),
    "safetensors": (lambda path: path.write_bytes(b"x" * 20), "data.safetensors"),
    "list": (lambda path: torch.save([1, 2], path), "data.pt"),
    "nothing": (lambda path: torch.save({}, path), "data.pt"),
    "one number": (lambda path: torch.save(torch.tensor(1.0), path), "data.pt"),
    "object": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "data.pt"),
}


@pytest.mark.parametrize("case", NO_TENSORS)
def test_calibration_data_that_is_no_tensor_is_refused(case, tmp_path):
    make, name = NO_TENSORS[case]
    make(tmp_path / name)
    save_file({k: v.float() for k, v in planted.mlp(0).items()}, tmp_path / "m.safetensors")
    files = [tmp_path / "m.safetensors"] * 2
    arguments = [
        "repair",
        "--assume-stack",
        *files,
        "--data",
        tmp_path / name,
        "--out",
        tmp_path / "o.safetensors",
    ]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert (result.exit_code, "holds no tensor of inputs" in result.stderr) == (1, True)
    assert len(result.stderr.strip().splitlines()) == 1


def test_repair_of_a_network_with_a_layer_norm_is_refused(tmp_path):
    net = torch.nn.Sequential(
        torch.nn.Linear(20, 8), torch.nn.LayerNorm(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    )
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    torch.save(torch.randn(30, 20), tmp_path / "data.pt")
    files = [str(tmp_path / "net.safetensors")] * 2
    place = ["--data", str(tmp_path / "data.pt"), "--out", str(tmp_path / "out.safetensors")]
    result = CliRunner().invoke(main, ["repair", "--assume-stack", *files, *place])
    words = "no stack of linear layers alone, as 1.weight shows"
    assert (result.exit_code, words in result.stderr) == (1, True)


def test_repair_of_raw_networks_needs_to_be_told_what_they_are(tmp_path):
    save_file({k: v.float() for k, v in planted.mlp(0).items()}, tmp_path / "m.safetensors")
    torch.save(torch.randn(30, 20), tmp_path / "data.pt")
    files = [str(tmp_path / "m.safetensors")] * 2
    place = ["--data", str(tmp_path / "data.pt"), "--out", str(tmp_path / "out.safetensors")]
    refused = CliRunner().invoke(main, ["repair", *files, *place])
    assert (refused.exit_code, "add --assume-stack" in refused.stderr) == (1, True)
    assert not (tmp_path / "out.safetensors").exists()


def model_with_text(folder, architecture, config, tokenizer):
    torch.manual_seed(0)
    architecture(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    (folder.parent / "text.txt").write_text(" ".join(f"w{i % 30}" for i in range(200)))
    return folder


def test_both_halves_of_a_fused_mlp_are_repaired(tmp_path, three_models):
    """Of a model that is its own parent, made weaker in one layer: it gets its strength back."""
    config = planted.HF["phi3"]().config
    parent = model_with_text(tmp_path / "p", Phi3ForCausalLM, config, three_models[0])
    weak = shutil.copytree(parent, tmp_path / "weak")
    name = "model.layers.0.mlp.gate_up_proj.weight"
    state = weights_of(parent)
    save_file(
        state | {name: state[name] / 2}, weak / "model.safetensors", metadata={"format": "pt"}
    )
    (tmp_path / "weak" / "tokenizer.json").unlink()
    arguments = ["repair", weak, parent, "--data", tmp_path / "text.txt", "--out", tmp_path / "r"]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(weights_of(tmp_path / "r")[name], state[name], rtol=1e-3, atol=1e-5)


def test_repair_of_a_mixture_of_experts_is_refused(tmp_path):
    config = MixtralConfig(**small_models.SMALL, num_key_value_heads=2, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text("w1")
    arguments = ["repair", *[tmp_path / "m"] * 2, "--data", tmp_path / "text.txt", "--out", "x"]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert (result.exit_code, "is a mixture of experts" in result.stderr) == (1, True)


def test_a_parent_of_another_size_is_named(tmp_path, three_models):
    """As it is before align --pad has filled it up."""
    wide = llama(tmp_path / "wide", 5, extra_words=2)
    (tmp_path / "t.txt").write_text("w1 w2 " * 50)
    place = ["--data", str(tmp_path / "t.txt"), "--out", str(tmp_path / "repaired")]
    result = CliRunner().invoke(main, ["repair", wide, wide, three_models[0], *place])
    assert result.exit_code == 1
    assert f"[63, 32] in {three_models[0]}, but [65, 32] in {wide}" in result.output
    assert not (tmp_path / "repaired").exists()
