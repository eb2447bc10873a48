"""The model card, and the way of a merge to a Hub and back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from configs import config_for
from conftest import llama, weights_of
from hub import Hub
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from mergekit_karcher.cli.main import main
from mergekit_karcher.report.schema import Model, Report

BIN = Path(sys.executable).parent


@pytest.fixture
def merged(three_models, merge, tmp_path, monkeypatch):
    """A folder that mergekit wrote, with the report that the merge wrote into it."""
    out = tmp_path / "merged"
    monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(out / "geometry"))
    config = {
        "merge_method": "karcher",
        "models": [{"model": model} for model in three_models],
        "dtype": "bfloat16",
    }
    assert merge(config).weights
    monkeypatch.delenv("MERGEKIT_KARCHER_REPORT")
    return out


def card(*arguments):
    return CliRunner().invoke(main, ["card", *map(str, arguments)])


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_card_tells_users_of_the_merge_and_shows_no_local_path(
    merged, three_models, monkeypatch
):
    before = (merged / "README.md").read_text()
    folder = str(Path(three_models[0]).parent)
    assert folder in before
    result = card(merged)
    assert result.exit_code == 0, result.output
    assert "section on the merge written, 3 local paths replaced by names" in result.stderr
    text = (merged / "README.md").read_text()
    report = Report.model_validate_json((merged / "geometry" / "report.json").read_text())
    section, details = text.split("## About this merge")[1].split("## Merge Details")
    shown, folded = section.split("<details>\n<summary>Geometry of this merge</summary>")
    assert text.count("## About this merge") == 1
    assert shown.strip().startswith("These three models are unrelated: their weights")
    for name in "abc":
        assert f"| {name} | 0.333 |\n" in shown
    said = (
        "Merged by `karcher` with granularity: tensor, origin: zero, magnitude: arithmetic, dtype:"
    )
    assert said in shown
    (code,) = re.findall(r"```python\n(.*?)```", shown, re.DOTALL)
    monkeypatch.chdir(merged.parent)
    names = {}
    exec(compile(code, "card", "exec"), names)
    assert set(names["model"].state_dict()) >= set(weights_of(merged))
    assert names["tokenizer"]("w1").input_ids
    assert "measure" not in text
    assert report.verdict in folded
    assert "| gate | 3 |" in folded
    assert folded.rstrip().endswith("</details>\n\n<!-- mergekit-karcher: end -->")
    assert "### Configuration" in details
    for file in re.findall(r"\]\((geometry/[^)]+)\)", text):
        assert (merged / file).is_file()
    assert text.count("](geometry/") == 3
    for path, data in contents(merged).items():
        assert folder.encode() not in data, path
    for name in "abc":
        assert f"* {name}\n" in text
    config = yaml.safe_load((merged / "mergekit_config.yml").read_text())
    assert [model["model"] for model in config["models"]] == ["a", "b", "c"]
    loaded = ModelCard.load(merged / "README.md")
    assert loaded.data.base_model is None
    assert loaded.data.tags == ["mergekit", "merge"]
    assert loaded.data.library_name == "transformers"


def test_twice_is_once_and_what_others_wrote_stays(merged):
    readme = merged / "README.md"
    card(merged)
    readme.write_text(readme.read_text() + "\nA line of mine.\n")
    card(merged)
    once = contents(merged)
    assert b"A line of mine." in once[Path("README.md")]
    assert card(merged).stderr == f"{readme}: nothing to change.\n"
    assert contents(merged) == once
    moved = once[Path("README.md")].decode().replace("A line of mine.\n", "")
    section = moved[moved.index("<!-- mergekit-karcher: geo") : moved.index("## Merge Details")]
    readme.write_text(moved.replace(section, "") + section)
    card(merged)
    assert readme.read_text().rstrip().endswith(section.rstrip())


def test_hub_ids_stay_and_are_the_base_models(merged, three_models):
    """As if one model and one adapter had come from the Hub, and mergekit had linked a folder."""
    path = merged / "geometry" / "report.json"
    report = Report.model_validate_json(path.read_text())
    models = [
        Model(name="org/first", hub_ids=["org/first"], is_base=False),
        Model(name="b+org/adapter", hub_ids=["org/adapter"], is_base=False),
        Model(name="third", hub_ids=[], is_base=False),
    ]
    changed = report.model_copy(update={"models": models})
    path.write_text(changed.model_dump_json(by_alias=True))
    replaced = {
        three_models[0]: "org/first",
        three_models[1]: f"{three_models[1]}+org/adapter",
        three_models[2]: "runs/third",
    }
    for name in ("README.md", "mergekit_config.yml"):
        text = (merged / name).read_text()
        for old, new in replaced.items():
            text = text.replace(old, new)
        link = "[runs/third](https://huggingface.co/runs/third)"
        (merged / name).write_text(text.replace("* runs/third", f"* {link}"))
    assert card(merged).exit_code == 0
    text = (merged / "README.md").read_text()
    assert "* third\n" in text
    assert "runs/third" not in text
    assert ModelCard.load(merged / "README.md").data.base_model == ["org/first", "org/adapter"]
    config = yaml.safe_load((merged / "mergekit_config.yml").read_text())
    assert [m["model"] for m in config["models"]] == ["org/first", "b+org/adapter", "third"]


def test_a_report_from_elsewhere_is_copied_in(merged, tmp_path):
    shutil.move(merged / "geometry", tmp_path / "elsewhere")
    missing = card(merged)
    assert missing.exit_code == 1
    assert "MERGEKIT_KARCHER_REPORT=" in missing.stderr
    assert "mergekit-karcher report CONFIG --out" in missing.stderr
    assert card(merged, "--report", tmp_path / "elsewhere", "--quiet").output == ""
    assert (merged / "geometry" / "angles.png").is_file()


def test_mistakes_get_one_sentence(merged):
    readme = (merged / "README.md").read_text()
    (merged / "README.md").write_text("---\n- a\n- b\n---\n# x\n")
    assert_one_sentence(card(merged), "front matter")
    (merged / "README.md").write_text(readme)
    (merged / "geometry" / "report.json").write_text("{}")
    assert_one_sentence(card(merged), "is not a report of the kind mergekit-karcher/report/1")


def test_what_mergekit_pytorch_wrote_gets_a_card_of_its_own(tmp_path, merge, monkeypatch):
    files = [str(tmp_path / f"raw{index}.safetensors") for index in range(2)]
    for index, file in enumerate(files):
        generator = torch.Generator().manual_seed(index)
        save_file({"w.weight": torch.randn(5, 4, generator=generator)}, file)
    out = tmp_path / "merged"
    monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(out / "geometry"))
    models = [
        {"model": file, "parameters": {"weight": index + 1}} for index, file in enumerate(files)
    ]
    outcome = merge({"merge_method": "karcher", "models": models}, command="mergekit-pytorch")
    assert not (out / "README.md").exists()
    assert card(out).exit_code == 0
    text = (out / "README.md").read_text()
    assert "\n# merged\n" in text
    assert "| raw1.safetensors | 0.667 |" in text
    assert str(tmp_path) not in text
    assert ModelCard(text).data.tags == ["mergekit", "merge"]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "card", "exec"), names)
    assert torch.equal(names["weights"]["w.weight"], outcome.weights["w.weight"])
    assert "nothing to change" in card(out).stderr


def test_a_card_of_another_method_claims_no_weights_or_settings_of_ours(
    close_models, merge, cli, tmp_path
):
    base, *models = close_models
    config = config_for(models, [1, -2, 3], base=base, merge_method="task_arithmetic")
    out = merge(config).out
    assert cli("report", "--out", out / "geometry", config=config).exit_code == 0
    assert card(out).exit_code == 0
    text = (out / "README.md").read_text()
    assert "| model |\n| --- |\n| tune1 |\n| tune2 |\n| tune3 |\n| base (base) |\n" in text
    assert "karcher would" not in text
    assert "Merged by `task_arithmetic` with dtype: float32.\n" in text


def test_only_the_files_of_a_report_are_copied(merged, tmp_path, monkeypatch):
    """Even from a folder that holds everything."""
    for path in (merged / "geometry").iterdir():
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "models.png").unlink()
    (tmp_path / "large.safetensors").write_text("")
    assert card(merged, "--report", tmp_path).exit_code == 0
    names = {path.name for path in (merged / "geometry").iterdir()}
    assert names == {"report.json", "report.md", "report.html", "angles.png", "lengths.png"}


def test_hub_ids_that_hold_a_local_path_and_hand_written_bases_stay(merged, three_models):
    readme, config = merged / "README.md", merged / "mergekit_config.yml"
    document = yaml.safe_load(config.read_text())
    document["tokenizer_source"] = "org/tokenizer"
    document["models"][0]["model"] = "runs/a"
    config.write_text(yaml.safe_dump(document))
    text = readme.read_text().replace(three_models[0], "runs/a").replace("base_model: []", "")
    text = text.replace("---\n", "---\nbase_model:\n- org/hand-written\n", 1)
    readme.write_text(text + "\nSee soruns/a and org/tokenizer and runs/a-instruct.\n")
    assert card(merged).exit_code == 0
    written = readme.read_text()
    assert "See soruns/a and org/tokenizer and runs/a-instruct." in written
    assert "* a\n" in written
    assert ModelCard.load(readme).data.base_model == ["org/hand-written"]
    assert yaml.safe_load(config.read_text())["tokenizer_source"] == "org/tokenizer"


def test_a_report_on_another_merge_is_refused(merged, three_models):
    config = merged / "mergekit_config.yml"
    before = contents(merged)
    config.write_text(config.read_text().replace(three_models[2], "/elsewhere/other"))
    assert_one_sentence(card(merged), "The report is not on the merge that")
    assert (merged / "README.md").read_bytes() == before[Path("README.md")]


def assert_one_sentence(result, words):
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_merge_card_upload_download_and_load(tmp_path):
    """The three lines of the README, with the real client, and the way back."""
    models = [llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    config = {"merge_method": "karcher", "models": [{"model": model} for model in models]}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    with Hub() as hub:
        environment = os.environ | hub.environment(tmp_path / "cache")

        def run(*command, **more):
            done = subprocess.run(
                [str(BIN / command[0]), *command[1:]],
                cwd=tmp_path,
                env=environment | more,
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            assert done.returncode == 0, done.stdout + done.stderr

        run("mergekit-yaml", "config.yml", "merged", MERGEKIT_KARCHER_REPORT="merged/geometry")
        run("mergekit-karcher", "card", "merged")
        run("hf", "upload", "me/merged", "merged")
        code = (
            "from huggingface_hub import snapshot_download\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "snapshot_download('me/merged', local_dir='back')\n"
            "model = AutoModelForCausalLM.from_pretrained('me/merged')\n"
            "tokens = AutoTokenizer.from_pretrained('me/merged')('w1 w2', return_tensors='pt')\n"
            "model.generate(tokens.input_ids, max_new_tokens=2)\n"
        )
        run("python", "-c", code)
    sent = contents(tmp_path / "merged")
    back = {k: v for k, v in contents(tmp_path / "back").items() if k.parts[0] != ".cache"}
    assert set(back) == set(sent)
    for path, data in sent.items():
        assert back[path] == data, path
    weights = weights_of(tmp_path / "back")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert weights.keys() == weights_of(models[0]).keys()
