"""What people really hand to align: files of any ending, parameters, constants, odd paths."""

from __future__ import annotations

import shlex
import shutil

import planted
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import COMMANDS, llama, weights_of
from planted import align_stacks, assert_equal_states, run_align
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM
from transformers import logging as transformers_logging

from mergekit_karcher.cli.main import main


def residual_net(state, x):
    """What no name shows: the second layer's input is added to its output."""
    hidden = (x @ state["0.weight"].T + state["0.bias"]).relu()
    hidden = hidden + (hidden @ state["2.weight"].T + state["2.bias"]).relu()
    return hidden @ state["4.weight"].T + state["4.bias"]


def run(line):
    """One of mergekit's commands or ours, as it was printed."""
    program, *arguments = shlex.split(line)
    command = main if program == "mergekit-karcher" else COMMANDS[program]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return result


def angles(result):
    assert result.exit_code == 0, result.output
    return next(line for line in result.stdout.splitlines() if line.startswith("Largest angle"))


def test_a_stack_is_not_assumed_without_being_told(tmp_path):
    """Skip connections cannot be seen, and to reorder such a network changes what it computes."""
    files = []
    for seed in range(2):
        files.append(tmp_path / f"n{seed}.safetensors")
        save_file(planted.mlp(seed, (6, 16, 16, 3)), files[-1])
    out = tmp_path / "aligned"
    refused = run_align(*files, "--out", out)
    assert refused.exit_code == 1
    assert "by their names, 0, 2, 4 follow one another" in refused.stderr
    assert "--assume-stack" in refused.stderr
    assert not out.exists()
    assert align_stacks(*files, "--out", out).exit_code == 0
    x = torch.randn(5, 6, dtype=torch.float64)
    before, after = (
        residual_net(load_file(folder / "n1.safetensors"), x) for folder in (tmp_path, out)
    )
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("name", ["a.ckpt", "a.th", "a.pth.tar", "a.pt", "a.bin", "a"])
def test_parameters_in_files_of_any_ending_are_aligned_merged_and_repaired(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    state = {key: tensor.float() for key, tensor in planted.mlp(0).items()}
    files = [name.replace("a", letter, 1) for letter in "ab"]
    for seed, file in enumerate(files):
        moved = planted.scrambled(state, planted.stack_of(state), 3) if seed else state
        torch.save({key: torch.nn.Parameter(tensor) for key, tensor in moved.items()}, file)
    torch.save(torch.nn.Parameter(torch.randn(40, 20)), "inputs.pt")
    result = align_stacks(*files, "--out", "aligned-nets")
    assert result.exit_code == 0, result.output
    written = torch.load(f"aligned-nets/{files[1]}", weights_only=True)
    assert_equal_states(written, state)
    assert not any(tensor.requires_grad for tensor in written.values())
    run(result.stdout.splitlines()[-1].partition("by: ")[2])
    parents = " ".join(shlex.quote(f"aligned-nets/{file}") for file in files)
    rest = "--data inputs.pt --assume-stack --out repaired"
    run(f"mergekit-karcher repair MERGED {parents} {rest}")
    repaired = weights_of("repaired")
    assert repaired.keys() == state.keys()
    for key, tensor in repaired.items():
        torch.testing.assert_close(tensor, state[key], rtol=1e-4, atol=1e-4)


def test_a_place_from_which_mergekit_pytorch_cannot_merge_is_refused(tmp_path):
    files = [tmp_path / f"net {seed}.pt" for seed in range(2)]
    for seed, file in enumerate(files):
        torch.save(planted.mlp(seed), file)
    refused = align_stacks(*files, "--out", tmp_path / "my nets")
    assert (refused.exit_code, "stops on paths with a space" in refused.stderr) == (1, True)
    result = align_stacks(*files, "--out", tmp_path / "nets")
    assert result.exit_code == 0, result.output
    run(result.stdout.splitlines()[-1].partition("by: ")[2].replace("MERGED", str(tmp_path / "m")))
    assert weights_of(tmp_path / "m")


def test_a_config_has_paths_that_begin_where_align_was_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        llama(tmp_path / f"m{seed}", seed)
    # A space in a path has to be quoted.
    result = run_align("m0", "m1", "--out", "out put")
    models = yaml.safe_load((tmp_path / "out put" / "config.yml").read_text())["models"]
    assert [entry["model"] for entry in models] == ["./out put/m0", "./out put/m1"]
    run(result.stdout.splitlines()[-1].partition("by: ")[2])
    assert weights_of("MERGED")


def test_what_mergekit_cannot_plan_is_merged_file_by_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        planted.hf_model("bert", seed).float().save_pretrained(f"b{seed}", max_shard_size="15KB")
    result = run_align("b0", "b1", "--out", "aligned")
    assert result.exit_code == 0, result.output
    merging, then = result.stdout.splitlines()[-2:]
    run(merging.partition("by: ")[2])
    assert "copy config.json and the tokenizer's files from aligned/b0 into MERGED" in then
    text = tmp_path / "text.txt"
    text.write_text("words")
    arguments = ["repair", "MERGED", "aligned/b0", "--data", str(text), "--out", "x"]
    refused = CliRunner().invoke(main, arguments)
    assert (
        refused.exit_code,
        "MERGED has no config.json, but aligned/b0 has" in refused.stderr,
    ) == (
        1,
        True,
    )
    shutil.copy("aligned/b0/config.json", "MERGED")
    transformers_logging.set_verbosity_error()
    _, info = BertForMaskedLM.from_pretrained("MERGED", output_loading_info=True)
    assert not info["missing_keys"]


def with_constants(folder, state, mask):
    """GPT-NeoX as it is published: masks and frequencies among the weights."""
    for layer in range(2):
        start = f"gpt_neox.layers.{layer}.attention."
        state[f"{start}bias"] = torch.tril(torch.ones(1, 1, 30, 30))
        state[f"{start}masked_bias"] = torch.tensor(mask)
        state[f"{start}rotary_emb.inv_freq"] = torch.rand(3).mul(1e4)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("mask", [-1e9, -torch.inf])
def test_constants_are_copied_and_count_nowhere(mask, tmp_path):
    folders = [tmp_path / f"m{seed}" for seed in range(2)]
    for seed, folder in enumerate(folders):
        planted.hf_model("gpt_neox", seed).float().save_pretrained(folder)
    without = angles(run_align(*folders, "--dry-run"))
    for folder in folders:
        torch.manual_seed(0)
        with_constants(folder, weights_of(folder), mask)
    out = tmp_path / "aligned"
    assert angles(run_align(*folders, "--out", out)) == without
    before, after = weights_of(folders[1]), weights_of(out / "m1")
    constants = [name for name in before if name.endswith(("n.bias", "masked_bias", "inv_freq"))]
    assert len(constants) == 6
    for name in constants:
        assert torch.equal(before[name], after[name])


def test_infinite_values_that_all_models_share_are_no_parameters(tmp_path):
    files = []
    for seed in range(2):
        state = planted.mlp(seed) | {"4.bias": torch.full((5,), -torch.inf, dtype=torch.float64)}
        files.append(tmp_path / f"n{seed}.safetensors")
        save_file(state, files[-1])
    angles(align_stacks(*files, "--dry-run"))
    save_file(state | {"4.bias": torch.full((5,), torch.inf, dtype=torch.float64)}, files[-1])
    refused = align_stacks(*files, "--dry-run")
    assert (refused.exit_code, "4.bias" in refused.stderr) == (1, True)


def test_buffers_of_whole_numbers_are_reconciled(tmp_path):
    folders = [tmp_path / f"m{seed}" for seed in range(2)]
    for seed, folder in enumerate(folders):
        planted.hf_model("bert", seed).float().save_pretrained(folder)
        state = weights_of(folder) | {"bert.embeddings.position_ids": torch.arange(20) + seed}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "aligned"
    assert run_align(*folders, "--out", out).exit_code == 0
    for folder in folders:
        ids = weights_of(out / folder.name)["bert.embeddings.position_ids"]
        assert torch.equal(ids, torch.arange(20))


PLACES = {
    r"C:\models\run1": "There is no model at",
    "./models/run1": "where relative paths begin",
    "~/nothing/there": "There is no model at",
    "models/run1": "the Hub cannot be reached",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_path_that_leads_nowhere_is_named(place, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    llama(tmp_path / "m", 0)
    result = run_align(place, tmp_path / "m", "--dry-run")
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert PLACES[place] in line


def test_paths_from_home_and_from_the_folder_of_a_config(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for seed in range(2):
        llama(tmp_path / f"m{seed}", seed)
    config = tmp_path / "c.yml"
    document = {"merge_method": "karcher", "models": [{"model": f"~/m{i}"} for i in range(2)]}
    config.write_text(yaml.safe_dump(document))
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = run_align("--config", config, "--out", "aligned")
    assert result.exit_code == 0, result.output
    assert weights_of("aligned/m1")
    document = {"merge_method": "karcher", "models": [{"model": f"m{i}"} for i in range(2)]}
    config.write_text(yaml.safe_dump(document))
    refused = run_align("--config", config, "--dry-run")
    words = "no model at m0 from this folder, but there is one from the folder of the config"
    assert (refused.exit_code, words in refused.stderr) == (1, True)
    assert f"run the command in {tmp_path}" in refused.stderr


def test_joint_alignment_shows_how_much_is_left(tmp_path, monkeypatch):
    files = []
    for seed in range(3):
        files.append(tmp_path / f"n{seed}.safetensors")
        save_file(planted.mlp(seed), files[-1])
    monkeypatch.setattr("mergekit_karcher.cli.align._DELAY", 0)
    result = align_stacks(*files, "--dry-run")
    assert result.exit_code == 0, result.output
    # A first look, three starts, and the distances.
    assert "5 of 5 done" in result.stderr
    assert "0 of 5 done" in result.stderr
    assert "start 3 of 3" in result.stderr
