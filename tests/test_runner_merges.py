"""`mergekit-karcher merge` writes what mergekit-yaml writes, by any method and any workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from configs import config_for
from conftest import llama
from processes import run
from transformers import AutoModelForCausalLM, AutoTokenizer

OURS = "mergekit-karcher merge"
SHARDS = ("--out-shard-size", "20K")


@pytest.fixture(autouse=True)
def one_thread():
    """What is forked from a process that has used OpenMP must keep to one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def method(models, name, base=None, **parameters):
    """A config of one of mergekit's own methods."""
    return {
        "merge_method": name,
        "models": [{"model": model} for model in models],
        "parameters": parameters,
        "dtype": "bfloat16",
    } | ({} if base is None else {"base_model": base})


CONFIGS = {
    "linear": lambda m: method(m, "linear", weight=1),
    "slerp": lambda m: method(m[:2], "slerp", m[0], t=0.3),
    "ties": lambda m: method(m[1:], "ties", m[0], weight=0.5, density=0.5),
    "karcher": lambda m: config_for(m, [1, 2, 3], dtype="bfloat16"),
    "rows": lambda m: config_for(m, granularity="row", origin="base", base=m[0]),
    "whole model": lambda m: config_for(m, [1, 2, 3], granularity="model"),
    "fisher": lambda m: config_for(m, base=m[0], merge_method="fisher", metrics=["self"] * 3),
    "layers": lambda m: {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": m[0], "layer_range": [0, 2]}]},
            {"sources": [{"model": m[1], "layer_range": [1, 3]}]},
        ],
        "dtype": "float16",
    },
}


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors*")}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_tensors_are_those_of_mergekit_yaml(kind, three_models, merge):
    config = CONFIGS[kind](three_models)
    theirs = merge(config, "--out-shard-size", "20K", name="theirs")
    ours = merge(config, *SHARDS, command=OURS, name="ours")
    assert_same_tensors(ours.weights, theirs.weights)
    other_files = {path.name for path in theirs.out.iterdir() if "safetensors" not in path.name}
    assert {path.name for path in ours.out.iterdir() if "safetensors" not in path.name} == (
        other_files
    )
    for name in other_files - {"README.md"}:
        assert (ours.out / name).read_bytes() == (theirs.out / name).read_bytes()
    card = (theirs.out / "README.md").read_text().replace("theirs", "ours")
    # mergekit-yaml lists the models in another order in each process.
    assert sorted((ours.out / "README.md").read_text().splitlines()) == sorted(card.splitlines())


@pytest.mark.parametrize("kind", ["karcher", "whole model"])
def test_the_bytes_do_not_depend_on_the_workers(kind, three_models, merge):
    config = CONFIGS[kind](three_models)
    one = merge(config, *SHARDS, "--workers", "1", command=OURS, name="one")
    three = merge(config, *SHARDS, "--workers", "3", command=OURS, name="three")
    assert len(shard_bytes(one.out)) > 3
    assert shard_bytes(one.out) == shard_bytes(three.out)


def test_methods_that_draw_numbers_draw_the_same_ones_in_every_run(three_models, merge):
    config = method(three_models[1:], "dare_linear", three_models[0], weight=0.5, density=0.5)
    seeds = [("--random-seed", seed) for seed in ("1", "1", "2")]
    runs = [
        merge(config, *SHARDS, *seed, "--workers", str(1 + i), command=OURS, name=f"run{i}")
        for i, seed in enumerate(seeds)
    ]
    same, again, other = (shard_bytes(run.out) for run in runs)
    assert same == again
    assert same != other


def test_shards_keep_to_their_size_and_the_index_names_every_tensor(three_models, merge):
    merged = merge(CONFIGS["karcher"](three_models), *SHARDS, command=OURS)
    index = json.loads((merged.out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == merged.weights.keys()
    sizes = {name: t.numel() * t.element_size() for name, t in merged.weights.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for shard in set(index["weight_map"].values()):
        assert sum(sizes[n] for n, where in index["weight_map"].items() if where == shard) <= 20_000
    loaded = AutoModelForCausalLM.from_pretrained(merged.out)
    assert torch.isfinite(loaded(torch.arange(6)[None]).logits).all()


def test_vocabularies_are_united_in_one_order_in_every_run(merge, tmp_path):
    models = [llama(tmp_path / f"m{i}", i, extra_words=8 * i) for i in range(3)]
    config = config_for(models, tokenizer={"source": "union", "pad_to_multiple_of": 8})
    theirs = merge(config, name="theirs")
    ours, again = (merge(config, *SHARDS, command=OURS, name=name) for name in ("ours", "again"))
    assert shard_bytes(ours.out) == shard_bytes(again.out)
    tokens, same_tokens, their_tokens = (
        AutoTokenizer.from_pretrained(run.out).get_vocab() for run in (ours, again, theirs)
    )
    assert tokens == same_tokens
    # mergekit-yaml gives the added tokens their rows in an order that no two runs share.
    rows = [tokens[token] for token in sorted(tokens)]
    their_rows = [their_tokens[token] for token in sorted(tokens)]
    for name, tensor in ours.weights.items():
        their = theirs.weights[name]
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensor, their = tensor[rows], their[their_rows]
        assert torch.equal(tensor, their), name


def test_no_file_depends_on_the_order_of_sets_in_a_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        llama(tmp_path / name, seed, extra_words=8)
    config = config_for(["./a", "./b", "./c"], tokenizer={"source": "union"})
    Path("config.yml").write_text(yaml.safe_dump(config))
    merged = []
    for seed in ("1", "4"):
        arguments = ["merge", "config.yml", f"{seed}/merged", "--quiet"]
        code = f"from mergekit_karcher.cli.main import main; main({arguments})"
        run(code, PYTHONHASHSEED=seed)
        merged.append({path.name: path.read_bytes() for path in Path(seed, "merged").iterdir()})
    assert merged[0] == merged[1]


def test_tied_heads(merge, tmp_path):
    models = [llama(tmp_path / f"t{i}", i, tie_word_embeddings=True) for i in range(2)]
    theirs = merge(config_for(models), name="theirs")
    ours = merge(config_for(models), command=OURS, name="ours")
    assert_same_tensors(ours.weights, theirs.weights)


@pytest.mark.parametrize("kind", ["karcher", "whole model", "rows"])
def test_the_report_and_the_closing_lines_are_those_of_one_process(
    kind, three_models, merge, tmp_path, monkeypatch
):
    config = CONFIGS[kind](three_models)
    said, reports = [], []
    for command, options in (("mergekit-yaml", ()), (OURS, (*SHARDS, "--workers", "2"))):
        folder = tmp_path / f"report of {command}"
        monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(folder))
        merged = merge(config, *options, command=command)
        assert merged.exit_code == 0, merged.output
        lines = merged.output.splitlines()
        begin = next(i for i, line in enumerate(lines) if " merged: " in line)
        said.append([line for line in lines[begin:] if "report" not in line])
        reports.append(json.loads((folder / "report.json").read_text()))
        merged.out.rename(tmp_path / command)
    assert said[0] == said[1]
    assert reports[0] == reports[1]


def test_stages_of_mergekit_multi(three_models, merge, tmp_path):
    stages = [
        config_for(three_models[:2], dtype="bfloat16") | {"name": "first"},
        config_for(["first", three_models[2]], dtype="bfloat16"),
    ]
    theirs = merge(stages, command="mergekit-multi", name="theirs")
    where = ("--intermediate-dir", str(tmp_path / "ours-stages"))
    ours = merge(stages, *where, command=OURS, name="ours")
    assert_same_tensors(ours.weights, theirs.weights)
    again = merge(stages, *where, "--overwrite", command=OURS, name="ours")
    assert "is whole, and is not merged again" in again.output
    assert_same_tensors(again.weights, theirs.weights)


def test_a_dry_run_reads_no_weights_and_writes_nothing(three_models, merge):
    dry = merge(CONFIGS["karcher"](three_models), *SHARDS, "--dry-run", command=OURS)
    assert dry.exit_code == 0, dry.output
    assert not dry.out.exists()
    assert "units, each done as a whole:" in dry.output
    assert "writes 54.6 kB." in dry.output
    assert "tensors merged" not in dry.output


def test_progress_as_json_reaches_the_end(three_models, merge):
    said = merge(CONFIGS["karcher"](three_models), "--json-progress", command=OURS).output
    lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"bytes')]
    assert lines[-1]["bytes"] == lines[-1]["total"] == 54592
    assert [line["bytes"] for line in lines] == sorted(line["bytes"] for line in lines)
