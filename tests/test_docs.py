"""Every command and config of the documentation runs, and every link leads somewhere.

Models, data and the Hub are small stand-ins here; what a block needs is made before its page runs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import COMMANDS, llama
from hub import Hub
from safetensors.torch import save_file
from small_models import train_with_adam
from test_examples import Stand, replaced

from mergekit_karcher.cli.main import main
from mergekit_karcher.host.parameters import FISHER_PARAMETERS, KARCHER_PARAMETERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IN_PROCESS = {**COMMANDS, "mergekit-karcher": main}

# What cannot be done in a test, and what is done instead.
INSTEAD = {
    "pip install './mergekit-karcher[report]'": "test -f mergekit-karcher/pyproject.toml",
    "mergekit-karcher suggest first second --base expert": (
        "mergekit-karcher suggest ../first ../second --base ../expert"
    ),
    "make demo": "make -n demo",
    "make test": "make -n test",
    "make test-mergekit": "make -n test-mergekit",
    "make bench": "make -n bench",
    "make .venv/.installed": "make -n .venv/.installed",
    "pip uninstall mergekit-karcher": "python -m pip show mergekit-karcher",
}

# The programs of a page that are neither mergekit's nor ours.
PROGRAMS = ("git", "hf", "make", "python", "test")


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def make_files(folder, page):
    """What the blocks of a page take as given."""
    for name in ("first", "second", "expert"):
        llama(folder / name, len(name), dtype=torch.float32)
        rows = [f'{{"text": "w{index} w2 w3"}}' for index in range(3)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    (folder / "text.txt").write_text(" ".join(f"w{index % 60}" for index in range(300)))
    if page == "align":
        for seed in range(3):
            llama(folder / f"run{seed + 1}", seed, dtype=torch.float32)
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            sizes = {"in.weight": (256, 3), "in.bias": (256,), "out.weight": (2, 256)}
            tensors = {
                f"{layer}.{name}": torch.randn(size, generator=generator)
                for layer in range(2)
                for name, size in (sizes | {"out.bias": (2,)}).items()
            }
            save_file(tensors, folder / f"net{seed + 1}.safetensors")
    if page in ("compare", "walk"):
        for name in ("base", "code", "maths"):
            llama(folder / name, len(name), dtype=torch.float32)
            words = [f"w{index * index % 59 + index // 900}" for index in range(9000)]
            (folder / f"{name}.txt").write_text(" ".join(words))
    if page == "metrics":
        train_with_adam(folder / "run", folder / "first")
        (folder / "run" / "checkpoint-4").rename(folder / "run" / "checkpoint-500")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, page.stem)
    stand, names, printed = Stand(tmp_path / "stand"), {}, ""
    (tmp_path / "stand").mkdir()
    with Hub() as hub:
        environment = os.environ | hub.environment(tmp_path / "cache")
        for language, block in blocks(page):
            if language == "yaml":
                title = re.match(r"# (\S+\.yml)", block)
                assert title, f"a config needs a first line with the name of its file: {block}"
                config = replaced(yaml.safe_load(block), LocalOr(stand), ())
                Path(title[1]).write_text(yaml.safe_dump(config))
            elif language == "python":
                exec(compile(block, page.name, "exec"), names)
            elif language == "sh":
                for line in block.replace("\\\n", " ").splitlines():
                    printed += run_line(line, environment)
            else:
                assert language == "text", f"{language} is neither run nor output"
                # Small models have other names and numbers, and that is all.
                for name, path in stand.made.items():
                    block = block.replace(name, Path(path).name)
                block = re.sub(r"at most \(in \S+\)", "at most (in TENSOR)", block)
                printed = re.sub(r"at most \(in \S+\)", "at most (in TENSOR)", printed)
                shape = re.sub(r"\d[\d.]*", r"\\d[\\d.]*", re.escape(block.strip()))
                assert re.search(shape.replace(r"\.\d", r"\d"), printed), block


class LocalOr:
    """A path of this folder stays; any other name gets a small model."""

    def __init__(self, stand):
        self.stand = stand

    def __getitem__(self, name):
        local = name == "identity" or name.startswith("./") or Path(name).exists()
        return name if local else self.stand[name]


def run_line(line, environment):
    """What one line of a shell block prints, run as by a user; mergekit's and ours in-process."""
    line = line.split("  #")[0].replace(" # ", "\0").split("\0")[0].strip()
    if not line:
        return ""
    line = INSTEAD.get(line, line).replace("ADDRESS-OF-THIS-REPOSITORY", str(ROOT))
    words = shlex.split(line)
    variables = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if words[0] == "cd":
        os.chdir(words[1])
        return ""
    # What is decided when torch is imported needs a process of its own.
    if words[0] in IN_PROCESS and "MERGEKIT_KARCHER" not in variables:
        result = CliRunner(env=variables).invoke(IN_PROCESS[words[0]], words[1:])
        assert result.exit_code == 0, f"{line}: {result.output} {result.exception!r}"
        return result.output
    assert words[0] in (*PROGRAMS, *IN_PROCESS), f"{line}: may change more than this test's folder"
    folder = Path(sys.executable).parent
    program = folder / words[0]
    words[0] = str(program) if program.exists() else words[0]
    done = subprocess.run(
        words,
        env=environment | variables | {"PATH": f"{folder}:{environment['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{line}: {done.stdout} {done.stderr}"
    return done.stdout + done.stderr


def test_a_wrong_command_or_config_is_noticed(three_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = [{"model": model, "parameters": {"wieght": 1}} for model in three_models]
    (tmp_path / "c.yml").write_text(yaml.safe_dump({"merge_method": "karcher", "models": models}))
    for line in (
        "mergekit-yaml c.yml out",
        "mergekit-karcher raport c.yml",
        "make -n nothing",
        "pip install anything",
    ):
        with pytest.raises(AssertionError, match=re.escape(line)):
            run_line(line, dict(os.environ))


def anchors(page):
    """The anchors that GitHub makes of the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8")))
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 160


def test_the_table_of_parameters_is_that_of_the_methods():
    table = re.findall(r"^\| `(\w+)` \| ([^|]+?) \| ([^|]+?) \|", README, re.MULTILINE)
    defaults = {name: default.strip("`") for name, _, default in table}
    of_a_model = [name for name, place, _ in table if place == "each model"]
    assert defaults.keys() == {parameter.name for parameter in KARCHER_PARAMETERS}
    for parameter in KARCHER_PARAMETERS:
        written = defaults[parameter.name]
        value = type(parameter.default)("" if written == "none" else written)
        assert value == parameter.default, parameter.name
    assert of_a_model == ["weight", "metric"]
    (of_fisher,) = re.findall(r"^`fisher` takes ((?:`\w+`[, and]*)+)", README, re.MULTILINE)
    assert re.findall(r"\w+(?=`)", of_fisher) == [p.name for p in FISHER_PARAMETERS]


def test_the_documentation_names_what_there_is():
    """Files of the package, extras, commands, and every page from the README."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    internals = (ROOT / "docs" / "internals.md").read_text(encoding="utf-8")
    files = re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", internals)
    assert len(files) > 20
    for file in files:
        assert (ROOT / file).exists() or (ROOT / "mergekit_karcher" / file).exists(), file
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in set(re.findall(r"mergekit-karcher\[(\w+)\]", text)):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    for command in main.commands:
        assert f"mergekit-karcher {command}" in text, command
    for page in PAGES[1:]:
        assert f"({page.relative_to(ROOT)})" in README, page
