"""`mergekit-karcher align`: what it reads, writes, shows and refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import planted
import pytest
import torch
import yaml
from conftest import weights_of
from planted import align_stacks, assert_equal_states, run_align, shapes_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_karcher.align.checkpoint import Checkpoint, write_safetensors
from mergekit_karcher.align.families import stack
from mergekit_karcher.errors import KarcherError


def save_hf(folder, family, state, dtype=torch.bfloat16, shard="15KB", **config):
    model = planted.HF[family]()
    for key, value in config.items():
        setattr(model.config, key, value)
    model = type(model)(model.config).to(dtype)
    model.load_state_dict({k: v.to(dtype) for k, v in state.items()}, strict=False)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture
def two_models(tmp_path):
    """One Mistral model, sharded, bf16, with a tokenizer file, and the same in another order."""
    model = planted.hf_model("mistral")
    state = {k: v.bfloat16() for k, v in planted.state_of(model).items()}
    moved = planted.scrambled(state, planted.specification(model, state), 6)
    for name, weights in (("first", state), ("second", moved)):
        save_hf(tmp_path / name, "mistral", weights)
        (tmp_path / name / "tokenizer.json").write_text('{"x": 1}')
    return tmp_path / "first", tmp_path / "second"


def test_checkpoints_are_written_whole_and_merge(two_models, tmp_path, merge):
    first, second = two_models
    out = tmp_path / "aligned"
    result = run_align(first, second, "--out", out)
    assert result.exit_code == 0, result.output
    assert_equal_states(weights_of(out / "second"), weights_of(first))
    assert_equal_states(weights_of(out / "first"), weights_of(first))
    for name in ("first", "second"):
        files = {path.name for path in (out / name).iterdir()}
        assert files == {path.name for path in (tmp_path / name).iterdir()}
        assert len([file for file in files if file.endswith(".safetensors")]) > 2
        loaded = AutoModelForCausalLM.from_pretrained(out / name)
        assert loaded.dtype == torch.bfloat16
    assert not list(out.glob("*.partial"))
    words = " ".join(result.output.split())
    assert "degrees before, 0 after" in words
    config = yaml.safe_load((out / "config.yml").read_text())
    assert config["merge_method"] == "karcher"
    merged = merge(config).weights
    for name, tensor in weights_of(first).items():
        torch.testing.assert_close(merged[name], tensor, rtol=2**-7, atol=0)


def test_an_alignment_can_be_applied_again(two_models, tmp_path):
    first, second = two_models
    out, again = tmp_path / "aligned", tmp_path / "again"
    assert run_align(first, second, "--out", out, "--quiet").output == ""
    stored = json.loads((out / "alignment.json").read_text())
    assert stored["schema"] == "mergekit-karcher/alignment/1"
    assert stored["reference"] == "first"
    assert stored["models"]["first"] == {}
    result = run_align(first, second, "--out", again, "--alignment", out / "alignment.json")
    assert result.exit_code == 0, result.output
    assert_equal_states(weights_of(again / "second"), weights_of(out / "second"))
    mistakes = {
        "does not fit second": stored
        | {"orders": [order[1:2] + order[1:] for order in stored["orders"]]},
        "with other symmetries than these": stored | {"specification": "0"},
        "knows no model second": stored | {"models": {"first": {}}},
        "is not an alignment of the kind": {},
    }
    for words, document in mistakes.items():
        (tmp_path / "wrong.json").write_text(json.dumps(document))
        result = run_align(
            first, second, "--out", tmp_path / "x", "--alignment", tmp_path / "wrong.json"
        )
        assert (result.exit_code, words in result.stderr) == (1, True), result.stderr
        assert not (tmp_path / "x").exists()


def test_a_dry_run_writes_nothing(two_models, tmp_path):
    result = run_align(*two_models, "--out", tmp_path / "aligned", "--dry-run")
    assert result.exit_code == 0
    assert "Nothing was written" in result.output
    assert "model.layers.#.mlp" in result.output
    assert not (tmp_path / "aligned").exists()


def test_models_that_are_aligned_are_left_where_they_are(two_models, tmp_path):
    first, _ = two_models
    tuned = Path(shutil.copytree(first, tmp_path / "tuned"))
    for file in tuned.glob("*.safetensors"):
        tensors = {k: v + 0.001 * torch.randn_like(v) for k, v in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    out = tmp_path / "aligned"
    result = run_align(first, tuned, "--out", out)
    assert "there is nothing to do" in result.output
    assert sorted(path.name for path in out.iterdir()) == ["alignment.json", "config.yml"]
    config = yaml.safe_load((out / "config.yml").read_text())
    assert [m["model"] for m in config["models"]] == [str(first), str(tuned)]


def test_the_models_of_a_config_and_its_base_as_reference(two_models, tmp_path):
    first, second = two_models
    third = shutil.copytree(second, tmp_path / "third")
    document = {
        "merge_method": "karcher",
        "base_model": str(first),
        "models": [
            {"model": str(second), "parameters": {"weight": 2}},
            {"model": str(third)},
        ],
        "parameters": {"origin": "base"},
        "dtype": "float32",
    }
    (tmp_path / "c.yml").write_text(yaml.safe_dump(document))
    out = tmp_path / "aligned"
    result = run_align("--config", tmp_path / "c.yml", "--out", out)
    assert result.exit_code == 0, result.output
    written = yaml.safe_load((out / "config.yml").read_text())
    assert written["base_model"] == str(out / "first")
    assert written["models"][0] == {"model": str(out / "second"), "parameters": {"weight": 2}}
    assert written["parameters"] == {"origin": "base"}
    for name in ("second", "third"):
        assert_equal_states(weights_of(out / name), weights_of(first))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_raw_checkpoints_of_each_kind(tmp_path, suffix, merge):
    net = planted.conv_net(0)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    spec = stack.specification(shapes_of(state))
    states = [state, planted.scrambled(state, spec, 1), planted.scrambled(state, spec, 2)]
    files = []
    for index, scrambled in enumerate(states):
        tensors = {k: v.contiguous() for k, v in scrambled.items()}
        for name in tensors:
            if name.endswith("num_batches_tracked"):
                tensors[name] = tensors[name] + index
        path = tmp_path / f"net{index}{suffix}"
        save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
        files.append(path)
    out = tmp_path / "aligned"
    result = align_stacks(*files, "--out", out)
    assert result.exit_code == 0, result.output
    for path in files:
        written = out / path.name
        tensors = load_file(written) if suffix == ".safetensors" else torch.load(written)
        assert_equal_states(tensors, state)
    config = yaml.safe_load((out / "config.yml").read_text())
    merged = merge(config, command="mergekit-pytorch").weights
    assert int(merged["1.num_batches_tracked"]) == 7


def test_bin_shards_become_safetensors(two_models, tmp_path):
    first, second = two_models
    weights = weights_of(second)
    for file in second.glob("*.safetensors*"):
        file.unlink()
    torch.save(weights, second / "pytorch_model.bin")
    out = tmp_path / "aligned"
    assert run_align(first, second, "--out", out).exit_code == 0
    assert_equal_states(weights_of(out / "second"), weights_of(first))
    assert (out / "second" / "model.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(out / "second")


def test_nothing_that_is_there_is_written_over(two_models, tmp_path):
    first, second = two_models
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = run_align(first, second, "--out", tmp_path)
    assert (result.exit_code, "exists: name a new folder" in result.stderr) == (1, True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    out = tmp_path / "aligned"
    assert run_align(first, second, "--out", out).exit_code == 0
    assert "exists: name a new folder" in run_align(second, first, "--out", out).stderr


def test_a_tensor_that_only_one_model_has_is_named(tmp_path):
    with_bias, without = planted.mlp(0), planted.mlp(1)
    del without["0.bias"]
    save_file(with_bias, tmp_path / "a.safetensors")
    save_file(without, tmp_path / "b.safetensors")
    for names in (("a", "b"), ("b", "a")):
        files = [tmp_path / f"{name}.safetensors" for name in names]
        result = align_stacks(*files, "--out", tmp_path / "x")
        assert (result.exit_code, "only one of them has 0.bias" in result.stderr) == (1, True)


def test_quantised_weights_are_refused(tmp_path):
    for name in "ab":
        state = {k: (10 * v).to(torch.int8) for k, v in planted.mlp(ord(name)).items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    result = align_stacks(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--out", tmp_path / "x"
    )
    assert (result.exit_code, "must be dequantised" in result.stderr) == (1, True)


def test_counts_are_reconciled_even_if_nothing_moves(tmp_path, merge):
    state = {k: v.contiguous() for k, v in planted.conv_net(0).state_dict().items()}
    for index in range(2):
        counted = {k: v + index if k.endswith("tracked") else v for k, v in state.items()}
        save_file(counted, tmp_path / f"n{index}.safetensors")
    out = tmp_path / "aligned"
    files = [tmp_path / f"n{index}.safetensors" for index in range(2)]
    assert align_stacks(*files, "--out", out).exit_code == 0
    config = yaml.safe_load((out / "config.yml").read_text())
    assert int(merge(config, command="mergekit-pytorch").weights["1.num_batches_tracked"]) == 7


def test_models_called_like_words_of_the_config(two_models, tmp_path, monkeypatch):
    first, second = two_models
    monkeypatch.chdir(tmp_path)
    first.rename(tmp_path / "base")
    document = {
        "merge_method": "karcher",
        "base_model": "base",
        "models": [{"model": str(second)}],
        "parameters": {"origin": "base"},
        "tokenizer": {"source": "base"},
    }
    (tmp_path / "c.yml").write_text(yaml.safe_dump(document))
    assert run_align("--config", "c.yml", "--out", "aligned").exit_code == 0
    written = yaml.safe_load((tmp_path / "aligned" / "config.yml").read_text())
    assert written["parameters"] == {"origin": "base"}
    assert written["tokenizer"] == {"source": "base"}
    assert written["base_model"] == "./aligned/base"


def test_metrics_are_carried_along(two_models, tmp_path, merge):
    """Of a model and of the same in another order, each with its metric: one metric in the end."""
    first, second = two_models
    state = weights_of(first)
    generator = torch.Generator().manual_seed(8)
    metric = {k: torch.rand(v.shape, generator=generator) for k, v in state.items()}
    spec = planted.specification(planted.hf_model("mistral"), state)
    for name, values in (("g1", metric), ("g2", planted.scrambled(metric, spec, 6))):
        (tmp_path / name).mkdir()
        values = {key: tensor.contiguous() for key, tensor in values.items()}
        save_file(values, tmp_path / name / "model.safetensors")
    shutil.copytree(tmp_path / "g2", tmp_path / "g3")
    by_filter = [
        {"filter": "mlp", "value": str(tmp_path / "g2")},
        {"filter": "norm", "value": str(tmp_path / "g3")},
        {"value": "identity"},
    ]
    document = {
        "merge_method": "fisher",
        "models": [
            {"model": str(first), "parameters": {"metric": str(tmp_path / "g1")}},
            {"model": str(second), "parameters": {"metric": by_filter}},
        ],
    }
    (tmp_path / "c.yml").write_text(yaml.safe_dump(document))
    out = tmp_path / "aligned"
    result = run_align("--config", tmp_path / "c.yml", "--out", out)
    assert result.exit_code == 0, result.output
    assert_equal_states(weights_of(out / "second-metric"), metric)
    config = yaml.safe_load((out / "config.yml").read_text())
    assert config["models"][0]["parameters"]["metric"] == str(tmp_path / "g1")
    carried = config["models"][1]["parameters"]["metric"]
    assert carried == [
        {"filter": "mlp", "value": str(out / "second-metric")},
        {"filter": "norm", "value": str(out / "second-metric-2")},
        {"value": "identity"},
    ]
    for name, tensor in merge(config).weights.items():
        torch.testing.assert_close(tensor, state[name], rtol=2**-7, atol=0)


def test_files_of_one_name_keep_their_endings(tmp_path):
    state = planted.mlp(0)
    save_file(state, tmp_path / "a.safetensors")
    torch.save(planted.mlp(1), tmp_path / "a.pt")
    out = tmp_path / "aligned"
    result = align_stacks(tmp_path / "a.safetensors", tmp_path / "a.pt", "--out", out)
    assert result.exit_code == 0, result.output
    stored = json.loads((out / "alignment.json").read_text())
    assert list(stored["models"]) == ["a.safetensors", "a.pt"]


def test_a_head_width_that_the_config_does_not_say(two_models, tmp_path):
    first, second = two_models
    for folder in (first, second):
        config = json.loads((folder / "config.json").read_text())
        config["head_dim"] = 3
        (folder / "config.json").write_text(json.dumps(config))
    result = run_align(first, second, "--out", tmp_path / "x")
    assert (result.exit_code, "Nothing is known of" in result.stderr) == (1, True)


def test_wrong_usage(two_models, tmp_path):
    first, second = two_models
    out = tmp_path / "x"
    for arguments in (
        [first],
        [],
        [first, first],
        [first, second, "--reference", "other"],
        [first, second, "--config", tmp_path / "first" / "config.json"],
        [first, f"{first}/"],
        [first, second, "--pad", "--spec", tmp_path / "first" / "config.json"],
    ):
        assert run_align(*arguments, "--out", out).exit_code == 2
    result = run_align(first, f"{second}+adapter", "--out", out)
    assert (result.exit_code, "merge the adapter" in result.stderr) == (1, True)
    missing = run_align(first, tmp_path / "nowhere.safetensors", "--out", out)
    assert (missing.exit_code, "There is no model at" in missing.stderr) == (1, True)
    (first / "config.json").write_text('{"model_type": "mistral"}')
    assert "lack 'num_attention_heads'" in run_align(first, second, "--out", out).stderr
    for name in "st":
        torch.save({"state_dict": planted.mlp(0)}, tmp_path / f"{name}.pt")
    nested = align_stacks(tmp_path / "s.pt", tmp_path / "t.pt", "--out", out)
    assert "by name alone" in nested.stderr
    (first / "config.json").write_text('{"model_type": "mamba"}')
    result = run_align(first, second, "--out", out)
    assert "of type mamba are not known" in result.stderr
    assert not out.exists()


def test_an_interrupted_write_leaves_nothing_that_looks_whole(two_models, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Checkpoint, "_copy_rest", full)
    out = tmp_path / "aligned"
    result = run_align(*two_models, "--out", out)
    assert (result.exit_code, "No space left" in result.stderr) == (1, True)
    assert not (out / "config.yml").exists()
    assert list(out.iterdir()) == []


def test_the_writer_writes_what_safetensors_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 4, dtype=torch.bfloat16),
        "b": torch.tensor(7),
        "c": torch.empty(0, 2),
        "d": torch.tensor([True, False]),
        "e": torch.randn(4, 3).T,
    }
    entries = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", entries, tensors.__getitem__, {"k": "v"})
    written = load_file(tmp_path / "x.safetensors")
    assert_equal_states(written, tensors)
    assert math.prod(written["c"].shape) == 0


def test_a_tokenizer_is_copied_as_it_is(three_models, tmp_path):
    out = tmp_path / "aligned"
    result = run_align(*three_models, "--out", out)
    assert result.exit_code == 0, result.output
    for model in three_models:
        copy = out / Path(model).name
        assert len(AutoTokenizer.from_pretrained(copy)) == len(AutoTokenizer.from_pretrained(model))


def test_the_writer_refuses_what_could_not_be_read(tmp_path):
    """A tensor that is not as the header says, also under python -O."""
    entries = {"a": (torch.float32, (2, 3))}
    for tensor in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(KarcherError, match=r"a came as .*, but torch.float32 .2, 3. was"):
            write_safetensors(tmp_path / "x.safetensors", entries, {"a": tensor}.get, {})
