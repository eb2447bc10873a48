"""The metric that Adam has kept: in checkpoints of the Trainer and of torch.distributed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import llama
from safetensors.torch import load_file
from small_models import train_with_adam
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from mergekit_karcher import files
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.metrics import adam
from mergekit_karcher.metrics.adam import adam_metric
from mergekit_karcher.metrics.moments import Moments


def train(optimizer, network, steps=3):
    """Some steps on random data; returns nothing but what the optimizer keeps."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        batch = torch.randint(3, 63, (2, 8), generator=generator)
        network(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def kept(optimizer, network, beta2, eps=1e-8):
    """sqrt(v / (1 - beta2^step)) + eps, by the parameter itself."""
    metric = {}
    for name, parameter in network.named_parameters():
        state = optimizer.state[parameter]
        unbiased = state["exp_avg_sq"].double() / (1 - beta2 ** float(state["step"]))
        metric[name] = unbiased.sqrt() + eps
    return metric


@pytest.fixture
def trained(tmp_path, text_model):
    """A checkpoint of the Hugging Face Trainer, and the optimizer that it is of."""
    trainer = train_with_adam(tmp_path / "run", text_model)
    inner = trainer.optimizer.optimizer
    return tmp_path / "run" / "checkpoint-4", kept(inner, trainer.model, 0.95)


def test_the_trainers_optimizer_by_number(run_fisher, trained, text_model, merge):
    checkpoint, expected = trained
    arguments = ("--from-optimizer", checkpoint, "--model", checkpoint, "--quiet")
    result = run_fisher(*arguments, "--out", "adam")
    assert result.exit_code == 0, result.output
    metric = load_file("adam/model.safetensors")
    assert metric.keys() == expected.keys()
    for name, tensor in metric.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=0)
    models = [
        {"model": str(checkpoint), "parameters": {"metric": str(Path("adam").resolve())}},
        {"model": text_model, "parameters": {"metric": "identity"}},
    ]
    merge({"merge_method": "karcher", "models": models, "dtype": "float32"}).weights  # noqa: B018


def test_what_is_cut_off_while_it_is_written_leaves_nothing(run_fisher, trained, monkeypatch):
    checkpoint, _ = trained
    rename = os.replace

    def failing(source, target):
        if Path(target).name == "metric.json":
            raise OSError("the disk is full")
        rename(source, target)

    arguments = ("--from-optimizer", checkpoint, "--model", checkpoint, "--quiet", "--out", "adam")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", failing)
        assert "the disk is full" in run_fisher(*arguments).output
    assert not [*Path().glob("adam*")]
    # An empty folder is as good as none.
    Path("adam").mkdir()
    assert run_fisher(*arguments).exit_code == 0
    assert {path.name for path in Path("adam").iterdir()} == {"model.safetensors", "metric.json"}


def test_shapes_that_do_not_prove_the_mapping_are_refused(run_fisher, trained, tmp_path):
    checkpoint, _ = trained
    wider = llama(tmp_path / "wider", 0)
    config = json.loads((Path(wider) / "config.json").read_text())
    network = LlamaForCausalLM(LlamaConfig(**config | {"intermediate_size": 56}))
    network.save_pretrained(wider, max_shard_size="1GB")
    (Path(wider) / "model.safetensors.index.json").unlink()
    result = run_fisher("--from-optimizer", checkpoint, "--model", wider, "--out", "bad")
    assert "numbers its 23 and 7 parameters" in result.output
    assert "no way of naming them fits" in result.output
    deeper = LlamaForCausalLM(LlamaConfig(**config | {"num_hidden_layers": 4}))
    with pytest.raises(KarcherError, match="no way of naming them fits the 39"):
        adam_metric(checkpoint, deeper)


def test_groups_of_a_plain_optimizer_and_of_the_trainers_rules(tmp_path):
    """All in one group, or weights of norms decayed by the earlier rule and not by the present."""

    class Alike(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_norm = nn.Linear(2, 2, bias=False)
            self.output = nn.Linear(2, 2, bias=False)
            self.b_norm = nn.Linear(2, 2, bias=False)
            self.a_bias = nn.Parameter(torch.zeros(2, 2))

    network = Alike()
    state = {"exp_avg_sq": torch.ones(2, 2), "step": torch.tensor(1.0)}
    group = {"betas": (0.9, 0.99), "eps": 1e-8}
    saved = {
        "state": dict.fromkeys(range(4), state),
        "param_groups": [{**group, "params": [0, 1, 2, 3]}],
    }
    torch.save(saved, tmp_path / "optimizer.pt")
    assert set(adam_metric(tmp_path, network)) == {n for n, _ in network.named_parameters()}
    saved["param_groups"] = [{**group, "params": [0]}, {**group, "params": [1, 2, 3]}]
    torch.save(saved, tmp_path / "optimizer.pt")
    assert set(adam_metric(tmp_path, network)) == {n for n, _ in network.named_parameters()}
    saved["param_groups"] = [{**group, "params": [0, 1]}, {**group, "params": [2, 3]}]
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(KarcherError, match="no way of naming them fits"):
        adam_metric(tmp_path, network)


def test_an_optimizer_that_kept_names_needs_no_proof(text_model, tmp_path):
    network = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    backwards = list(reversed(list(network.named_parameters())))
    optimizer = torch.optim.AdamW(backwards)
    train(optimizer, network)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    metric = adam_metric(tmp_path, network)
    for name, expected in kept(optimizer, network, 0.999).items():
        torch.testing.assert_close(metric[name].double(), expected, rtol=1e-6, atol=0)


def test_two_ways_of_naming_that_fit_alike_are_refused(trained, monkeypatch, text_model):
    checkpoint, _ = trained
    network = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    groupings = adam._groupings

    def ambiguous(network):
        first = next(groupings(network))
        yield first
        swap = {"k_proj": "v_proj", "v_proj": "k_proj"}  # of one shape
        yield [
            [re.sub("[kv]_proj", lambda m: swap[m[0]], name) for name in names] for names in first
        ]

    monkeypatch.setattr(adam, "_groupings", ambiguous)
    with pytest.raises(KarcherError, match="more than one way of naming them fits"):
        adam_metric(checkpoint, network)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("inside", ["", "optimizer_0"])
def test_distributed_checkpoints_have_names(run_fisher, text_model, tmp_path, flat, inside):
    network = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.98), eps=1e-7)
    train(optimizer, network)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(network, optimizer, options=options)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "run" / inside, no_dist=True)
    result = run_fisher(text_model, "--from-optimizer", "run", "--out", "adam", "--quiet")
    assert result.exit_code == 0, result.output
    metric = load_file("adam/model.safetensors")
    for name, expected in kept(optimizer, network, 0.98, 1e-7).items():
        torch.testing.assert_close(metric[name].double(), expected, rtol=1e-6, atol=0)


def test_names_in_one_file_may_have_wrappers(text_model, tmp_path):
    network = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    for parameter in network.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(p for p in network.parameters() if p.requires_grad)
    train(optimizer, network)
    state = get_optimizer_state_dict(network, optimizer)
    for part in ("state", "param_groups"):
        assert part in state
    state["state"] = {f"module._orig_mod.{n}": entry for n, entry in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [f"module._orig_mod.{name}" for name in group["params"]]
    torch.save(state, tmp_path / "optimizer.bin")
    metric = adam_metric(tmp_path, network)
    # What was frozen never moved: no weight there.
    assert not metric["model.embed_tokens.weight"].any()
    name = "model.layers.0.mlp.up_proj.weight"
    entry = optimizer.state[network.get_parameter(name)]
    expected = (entry["exp_avg_sq"].double() / (1 - 0.999**3)).sqrt() + 1e-8
    torch.testing.assert_close(metric[name].double(), expected, rtol=1e-6, atol=0)


def test_what_is_no_adam_is_refused(text_model, tmp_path):
    network = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    train(optimizer, network)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(KarcherError, match="has momentum_buffer for 0, but no exp_avg_sq"):
        adam_metric(tmp_path, network)
    unused = torch.optim.AdamW(network.parameters())
    torch.save(unused.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(KarcherError, match="saved before the first step"):
        adam_metric(tmp_path, network)
    torch.save({"step": 1}, tmp_path / "optimizer.pt")
    with pytest.raises(KarcherError, match="is not the state of an optimizer"):
        adam_metric(tmp_path, network)
    (tmp_path / "optimizer.pt").write_bytes(b"no pickle")
    with pytest.raises(KarcherError, match="cannot be read"):
        adam_metric(tmp_path, network)
    empty = tmp_path / "empty"
    (empty / "global_step4").mkdir(parents=True)
    with pytest.raises(KarcherError, match=r"no optimizer state \(what DeepSpeed saves"):
        adam_metric(empty, network)
    state = get_optimizer_state_dict(network, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "sgd", no_dist=True)
    with pytest.raises(KarcherError, match="no exp_avg_sq of a named parameter"):
        adam_metric(tmp_path / "sgd", network)
    train(unused, network)
    dcp.save({"optimizer": unused.state_dict()}, checkpoint_id=tmp_path / "raw", no_dist=True)
    with pytest.raises(KarcherError, match="saved without names"):
        adam_metric(tmp_path / "raw", network)


def test_moments_without_a_past_and_of_an_old_format(text_model, tmp_path):
    squares = torch.tensor([4.0, 0.0])
    assert Moments(squares, 3, 0.0, 0.5).metric().tolist() == [2.5, 0.5]
    assert Moments(squares, 0, 0.9, 0.5).metric().tolist() == [2.5, 0.5]
    network = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(network.parameters())
    train(optimizer, network)
    torch.save(
        optimizer.state_dict(), tmp_path / "optimizer.pt", _use_new_zipfile_serialization=False
    )
    name = "lm_head.weight"
    expected = kept(optimizer, network, 0.999)[name]
    torch.testing.assert_close(
        adam_metric(tmp_path, network)[name].double(), expected, rtol=1e-6, atol=0
    )
