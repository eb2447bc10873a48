"""Reports that a merge or the command writes, and where they are written."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path

import pytest
import torch
from configs import config_for
from conftest import weights_of
from safetensors.torch import save_file

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.report import store
from mergekit_karcher.report.schema import Report


@pytest.mark.parametrize("granularity", ["tensor", "row", "model"])
@pytest.mark.parametrize("origin", ["zero", "base"])
def test_a_merge_writes_the_same_report_and_the_same_weights(
    close_models, cli, merge, tmp_path, monkeypatch, granularity, origin
):
    base, *models = close_models
    config = config_for(models, [1, 2, 1], base=base, origin=origin, granularity=granularity)
    plain = merge(config, name="plain").weights
    monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(tmp_path / "seen"))
    for name, tensor in merge(config, name="watched").weights.items():
        assert torch.equal(tensor, plain[name]), name
    monkeypatch.delenv("MERGEKIT_KARCHER_REPORT")
    written = json.loads((tmp_path / "seen" / "report.json").read_text())
    asked = cli("report", "--json", config=config)
    assert asked.exit_code == 0, asked.output
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
        participants = models if origin == "base" else [*models, base]
        inputs = [weights_of(model)[one["name"]].double() for model in participants]
        start = weights_of(base)[one["name"]].double() if origin == "base" else 0 * inputs[0]
        again = start + sum(c * (w - start) for c, w in zip(k, inputs, strict=True))
        torch.testing.assert_close(again.float(), plain[one["name"]], rtol=0, atol=1e-7)
    if granularity == "model":
        assert len({tuple(t["coefficients"]) for t in written["tensors"]}) == 1


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
    assert written["verdict"].startswith("For these two models, ")


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
    for heading in ("The weights", "angle", "lost, %", "The changes from the base", "kept, %"):
        assert heading in words
    assert f"Wrote report.json, report.md, report.html and 3 plots to {out}." in result.stderr
    text = (out / "report.md").read_text()
    assert report.verdict in text
    for picture in ("angles.png", "models.png", "lengths.png"):
        assert f"]({picture})" in text
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in text + (out / "report.json").read_text()
    quiet = cli("report", "--quiet", "--out", out, config=config)
    assert quiet.stderr == ""
    assert quiet.stdout == result.stdout


def test_no_line_is_wider_than_80_columns_and_no_number_is_cut(cli, tmp_path, monkeypatch):
    """Whatever the terminal says: here there is every column that a table can have."""
    monkeypatch.setenv("COLUMNS", "40")
    generator = torch.Generator().manual_seed(3)
    # Numbers that can be added without rounding: the first two changes are exactly opposite.
    base, *noise = torch.randint(-8, 9, (3, 30, 20), generator=generator).float()
    tensors = [base + noise[0], base - noise[0], base - noise[0] + noise[1] / 64]
    names = ["model.embed_tokens.weight", "model.layers.11.mlp.gate_up_proj.weight", "x.weight"]
    for index, tensor in enumerate([*tensors, base]):
        save_file({name: tensor.clone() for name in names}, tmp_path / f"m{index}.safetensors")
    files = [str(tmp_path / f"m{index}.safetensors") for index in range(4)]
    opposite = str(tmp_path / "opposite.safetensors")
    save_file({name: tensors[0].neg() for name in names}, opposite)
    for origin, models in (("base", files[:3]), ("zero", [files[0], opposite, files[3]])):
        config = config_for(models, base=files[3], origin=origin)
        shown = cli("report", "--quiet", config=config).stdout
        assert "not unique" in shown
        assert ("differs, %" in shown) == (origin == "zero")
        assert max(map(len, shown.splitlines())) <= 80
        assert "…" not in shown
        assert "gate and up" in shown


def test_the_columns_of_many_models_are_not_cut(cli, tmp_path):
    files = [str(tmp_path / f"m{index}.safetensors") for index in range(15)]
    for file in files:
        save_file({"layer.weight": torch.rand(6, 5)}, file)
    metrics = ["identity"] * 15
    config = config_for(files, metrics=metrics, merge_method="fisher")
    shown = cli("report", "--quiet", config=config).stdout
    rows = [line.split() for line in shown.splitlines() if line.startswith("  other")]
    assert rows[1:] == [["other", *["6.67"] * 8], ["other", *["6.67"] * 7]]
    assert "How much models 9 to 15 count, in %" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("library", "left_out", "what"),
    [("matplotlib", "*.png", "no plots"), ("plotly", "report.html", "no report.html")],
)
def test_without_a_library_the_rest_is_written(
    close_models, cli, tmp_path, monkeypatch, library, left_out, what
):
    true_import = builtins.__import__

    def without_library(name, *rest, **named):
        if name.split(".")[0] == library:
            raise ImportError(name)
        return true_import(name, *rest, **named)

    config = config_for(close_models[1:])
    seen = tmp_path / "seen"
    assert cli("report", "--out", seen, config=config).exit_code == 0
    files = {path.name for path in seen.iterdir()}
    gone = {path.name for path in seen.glob(left_out)}
    assert gone
    monkeypatch.setattr(builtins, "__import__", without_library)
    result = cli("report", "--out", seen, config=config)
    assert result.exit_code == 0
    assert f"The report has {what}, because {library} is not installed: pip" in result.stderr
    assert "pip install 'mergekit-karcher[report]'" in result.stderr
    assert {path.name for path in seen.iterdir()} == files - gone
    assert ("![" in (seen / "report.md").read_text()) == (library == "plotly")


@pytest.fixture
def written(close_models, cli, tmp_path):
    """A folder with all files of a report."""
    folder = tmp_path / "written"
    assert cli("report", "--out", folder, config=config_for(close_models[1:])).exit_code == 0
    return folder


@pytest.mark.parametrize(
    "failing", ["angles.png", "lengths.png", "report.html", "report.md", "report.json"]
)
@pytest.mark.parametrize("how", ["write", "copy"])
def test_a_report_that_was_not_finished_has_no_report_json(
    written, tmp_path, monkeypatch, failing, how
):
    """Neither the new one nor the old, and no file that is only begun."""
    report, target = store.read(written), tmp_path / "target"
    store.copy(written, target)
    replace = os.replace

    def full(source, goal):
        if Path(goal).name == failing:
            raise OSError("No space left on device")
        replace(source, goal)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(report, target) if how == "write" else store.copy(written, target)
    names = {path.name for path in target.iterdir()}
    assert "report.json" not in names
    assert not [name for name in names if name.endswith(".partial")]
    assert names < {path.name for path in written.iterdir()}


def test_what_is_not_a_report_of_this_version_is_refused(written, tmp_path):
    document = json.loads((written / "report.json").read_text())
    (written / "report.json").write_text(json.dumps(document | {"version": None}))
    with pytest.raises(KarcherError, match="is not a report of the kind mergekit-karch"):
        store.read(written)
    with pytest.raises(KarcherError, match="There is no report at"):
        store.read(tmp_path)


def test_stages_get_folders_of_their_own(close_models, merge, tmp_path, monkeypatch):
    monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(tmp_path / "seen"))
    first = config_for(close_models[1:3], name="pair")
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

    monkeypatch.setattr("mergekit_karcher.host.tasks.write", full)
    monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(tmp_path / "seen"))
    outcome = merge(config_for(close_models[1:]))
    assert outcome.weights
    assert (outcome.out / "config.json").is_file()
    assert "The report was not written to" in caplog.text
    assert "No space left" in caplog.text


def test_another_method_with_the_variable_set_is_warned_of(
    close_models, merge, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(tmp_path / "seen"))
    config = config_for(close_models[1:3], [1, 1], merge_method="linear")
    assert merge(config).weights
    assert "only merges by karcher write a report" in caplog.text
    assert not (tmp_path / "seen").exists()
