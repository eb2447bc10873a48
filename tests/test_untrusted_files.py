"""No pickle that any command reads can run code, also where torch's old default is in force.

A marker is planted in every kind of file: a pickle that would make a folder if it were loaded
without restriction. With the environment variable that brings back torch's default before 2.6,
each command must end in one sentence, and no marker may appear.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import tarfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    MetadataIndex,
)

from mergekit_karcher.cli.main import main
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.metrics.distributed import _read_metadata, distributed_moments

MARKER = "marker"
COMMANDS = {}

# Why a command may stop: torch's words, ours, and those of datasets, which skips pickles.
REFUSALS = ("Weights only load failed", "could run any code", "No (supported) data files")


class Planted:
    """Makes the marker when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.path.abspath(MARKER),)


def case(function):
    """A command, by the name of what makes its files; that returns its arguments."""
    COMMANDS[function.__name__] = function
    return function


@pytest.fixture(autouse=True)
def _old_default(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)


def network(seed=0):
    """The tensors of a plain stack of two layers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (6, 4), "0.bias": (6,), "1.weight": (3, 6), "1.bias": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def raw(name, seed=0, planted=True):
    """A file of tensors, safetensors or a pickle, with something else beside them."""
    if name.endswith(".safetensors"):
        save_file(network(seed), name)
    else:
        torch.save({**network(seed), **({"more": Planted()} if planted else {})}, name)
    return name


def in_one_pickle(model, name):
    """A copy of a model, whose weights are one pickle with something else beside them."""
    folder = Path(name)
    folder.mkdir()
    weights = {}
    for path in Path(model).iterdir():
        if path.suffix == ".safetensors":
            weights.update(load_file(path))
        elif "index" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save({**weights, "more": Planted()}, folder / "pytorch_model.bin")
    return name


def config(path, models, **more):
    Path(path).write_text(yaml.safe_dump({"merge_method": "karcher", "models": models, **more}))
    return path


# ---------------------------------------------------------------- fisher


FROM_OPTIMIZER = ("fisher", "--out", "metric", "--from-optimizer")


@case
def fisher_from_a_state(models):
    torch.save({"state": {}, "param_groups": [], "more": Planted()}, "state.pt")
    return *FROM_OPTIMIZER, "state.pt", models[0]


@case
def fisher_from_the_trainers_state(models):
    Path("run").mkdir()
    torch.save({"state": {0: Planted()}, "param_groups": []}, "run/optimizer.pt")
    return *FROM_OPTIMIZER, "run", models[0]


@case
def fisher_from_a_state_of_the_old_format(models):
    Path("run").mkdir()
    state = {"state": {0: Planted()}, "param_groups": []}
    torch.save(state, "run/optimizer.bin", _use_new_zipfile_serialization=False)
    return *FROM_OPTIMIZER, "run", models[0]


def distributed_checkpoint(betas=(0.9, 0.999)):
    name = "lm_head.weight"
    moments = {"exp_avg_sq": torch.ones(63, 32), "step": torch.tensor(3.0)}
    settings = {"betas": betas, "eps": 1e-8}
    state = {"state": {name: moments}, "param_groups": {name: settings}}
    dcp.save({"optimizer": state}, checkpoint_id="run", no_dist=True)
    return Path("run/.metadata")


@case
def fisher_from_distributed_metadata(models):
    Path("run").mkdir()
    Path("run/.metadata").write_bytes(pickle.dumps(Planted()))
    return *FROM_OPTIMIZER, "run", models[0]


@case
def fisher_from_distributed_metadata_that_are_whole(models):
    path = distributed_checkpoint()
    content = pickle.loads(path.read_bytes())
    content.planner_data["more"] = Planted()
    path.write_bytes(pickle.dumps(content))
    return *FROM_OPTIMIZER, "run", models[0]


@case
def fisher_from_a_distributed_setting(models):
    distributed_checkpoint(betas=Planted())
    return *FROM_OPTIMIZER, "run", models[0]


@case
def fisher_from_a_distributed_tensor(models):
    path = distributed_checkpoint()
    content = pickle.loads(path.read_bytes())
    key = "optimizer.state.lm_head.weight.exp_avg_sq"
    index = MetadataIndex(key, (0, 0))
    stored = content.storage_data[index]
    shard = Path("run") / stored.relative_path
    blob = io.BytesIO()
    torch.save(Planted(), blob)
    content.storage_data[index] = replace(
        stored, offset=shard.stat().st_size, length=len(blob.getvalue())
    )
    shard.write_bytes(shard.read_bytes() + blob.getvalue())
    path.write_bytes(pickle.dumps(content))
    return *FROM_OPTIMIZER, "run", models[0]


@case
def fisher_of_a_model(models):
    Path("text.txt").write_text("w1 w2 w3")
    return "fisher", in_one_pickle(models[0], "m"), "--data", "text.txt", "--out", "metric"


@case
def fisher_of_a_dataset(models):
    Path("data").mkdir()
    Path("data/train.pkl").write_bytes(pickle.dumps(Planted()))
    return "fisher", models[0], "--data", "data", "--out", "metric"


@case
def fisher_of_an_archive(models):
    Path("data").mkdir()
    content = pickle.dumps(Planted())
    with tarfile.open("data/train.tar", "w") as archive:
        for suffix in ("pickle", "pyd", "pth"):
            entry = tarfile.TarInfo(f"0.{suffix}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return "fisher", models[0], "--data", "data", "--out", "metric"


# ---------------------------------------------------------------- align, repair


@case
def align_of_bin(models):
    return "align", raw("a.bin"), raw("b.bin", 1), "--out", "aligned"


@case
def align_of_pt(models):
    return "align", raw("a.pt"), raw("b.pt", 1), "--out", "aligned"


@case
def align_of_pth(models):
    return "align", raw("a.pth"), raw("b.pth", 1), "--out", "aligned"


@case
def align_of_models(models):
    return "align", in_one_pickle(models[0], "m"), in_one_pickle(models[1], "n"), "--out", "aligned"


@case
def align_of_metrics(models):
    files = [raw("a.safetensors"), raw("b.safetensors", 1)]
    entries = [
        {"model": file, "parameters": {"metric": raw(f"{file[0]}-metric.bin")}} for file in files
    ]
    return "align", "--assume-stack", "--config", config("config.yml", entries), "--out", "aligned"


@case
def repair_with_data(models):
    files = [raw("a.safetensors"), raw("b.safetensors", 1)]
    torch.save({"x": torch.ones(5, 4), "more": Planted()}, "data.pt")
    return "repair", "--assume-stack", *files, "--data", "data.pt", "--out", "repaired.safetensors"


@case
def repair_of_bin(models):
    save_file({"x": torch.ones(5, 4)}, "data.safetensors")
    merged, parent = raw("a.bin"), raw("b.safetensors", 1)
    return (
        "repair",
        "--assume-stack",
        merged,
        parent,
        "--data",
        "data.safetensors",
        "--out",
        "repaired.bin",
    )


@case
def repair_by_a_parent_in_bin(models):
    save_file({"x": torch.ones(5, 4)}, "data.safetensors")
    merged, parent = raw("a.safetensors"), raw("b.bin", 1)
    return (
        "repair",
        "--assume-stack",
        merged,
        parent,
        "--data",
        "data.safetensors",
        "--out",
        "repaired.safetensors",
    )


@case
def repair_of_a_model(models):
    Path("text.txt").write_text("w1 " * 70)
    merged = in_one_pickle(models[0], "m")
    return "repair", merged, models[1], "--data", "text.txt", "--out", "repaired"


@case
def repair_by_a_parent(models):
    Path("text.txt").write_text("w1 " * 70)
    parent = in_one_pickle(models[1], "m")
    return "repair", models[0], parent, "--data", "text.txt", "--out", "repaired"


# ---------------------------------------------------------------- report


@case
def report_on_bin(models):
    return "report", config("config.yml", [{"model": raw("a.bin")}, {"model": raw("b.bin", 1)}])


@case
def report_on_pt(models):
    return "report", config("config.yml", [{"model": raw("a.pt")}, {"model": raw("b.pt", 1)}])


@case
def report_on_models(models):
    named = [in_one_pickle(models[0], "m"), models[1]]
    return "report", config("config.yml", [{"model": model} for model in named], dtype="float32")


@case
def report_on_models_unpickled_lazily(models):
    return *report_on_models(models), "--lazy-unpickle"


@case
def report_on_metrics(models):
    entries = [
        {"model": model, "parameters": {"metric": raw(f"{index}-metric.bin")}}
        for index, model in enumerate(models[:2])
    ]
    return "report", config("config.yml", entries, dtype="float32")


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_what_is_planted(name, three_models):
    arguments = COMMANDS[name](three_models)
    result = CliRunner().invoke(main, list(arguments))
    assert not Path(MARKER).exists()
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.output
    assert any(words in errors[0] for words in REFUSALS), errors
    assert "Traceback" not in result.output


def test_card_and_doctor_read_no_weights(tmp_path):
    Path("merged").mkdir()
    for name in ("pytorch_model.bin", "optimizer.pt", "geometry.pt"):
        raw(f"merged/{name}")
    for arguments in (["card", "merged"], ["doctor"]):
        CliRunner().invoke(main, arguments)
        assert not Path(MARKER).exists()


def state_file():
    raw("a.bin")
    torch.load("a.bin")


def metadata():
    fisher_from_distributed_metadata_that_are_whole(["model"])
    FileSystemReader("run").read_metadata()


def setting():
    fisher_from_a_distributed_setting(["model"])
    key = "optimizer.param_groups.lm_head.weight.betas"
    dcp.load({key: None}, checkpoint_id="run", no_dist=True)


@pytest.mark.parametrize("read", [state_file, metadata, setting])
def test_what_is_planted_is_alive(read):
    """By the readers that the commands must not use."""
    read()
    assert Path(MARKER).exists()


def test_metadata_are_refused_by_the_name_of_what_they_ask_for():
    fisher_from_distributed_metadata(["model"])
    words = re.escape(f"{Path('run/.metadata')} cannot be read as the metadata of a torch ")
    with pytest.raises(KarcherError, match=rf"{words}.*it asks for \w+\.mkdir, which could run"):
        next(distributed_moments(Path("run")))


def test_metadata_are_read_once_and_never_by_torch(monkeypatch):
    """A file that changes between two readings would get past the first one's check."""
    distributed_checkpoint()
    moments = distributed_moments(Path("run"))
    monkeypatch.setattr(FileSystemReader, "read_metadata", lambda *_, **__: pytest.fail("torch's"))
    name, entry = next(moments)
    assert (name, entry.step) == ("lm_head.weight", 3)
    assert torch.equal(entry.squares, torch.ones(63, 32))


class Member:
    """What a pickle asks getattr for."""

    def __init__(self, owner, name):
        self._request = getattr, (owner, name)

    def __reduce__(self):
        return self._request


def test_metadata_of_python_3_11_0_ask_for_a_member_of_an_enum():
    """So did Python 3.11.0 to 3.11.3 pickle all enums."""
    path = distributed_checkpoint()
    content = pickle.loads(path.read_bytes())
    content.planner_data["more"] = Member(_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST")
    path.write_bytes(pickle.dumps(content))
    read = _read_metadata(path).planner_data["more"]
    assert read is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (OrderedDict, "fromkeys"),
        (Metadata, "TORCH_CHANNELS_LAST"),
        (_MEM_FORMAT_ENCODING, "__class__"),
    ],
)
def test_metadata_may_ask_for_no_other_attribute(owner, name):
    path = distributed_checkpoint()
    path.write_bytes(pickle.dumps(Member(owner, name)))
    with pytest.raises(KarcherError, match=rf"asks for {name} of .*, which could run any code"):
        next(distributed_moments(Path("run")))
