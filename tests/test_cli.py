"""The command as a shell sees it, and what doctor says of every way in which ours is not active."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

import mergekit_karcher
from mergekit_karcher.cli import doctor
from mergekit_karcher.cli.main import main
from mergekit_karcher.host.compat import SUPPORTED

BIN = Path(sys.executable).parent


def shell(*arguments, **environment):
    """The installed command in a process of its own."""
    return subprocess.run(
        [str(BIN / "mergekit-karcher"), *arguments],
        env=os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_version_and_help_import_nothing_heavy():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nfrom mergekit_karcher.cli.main import main\n"
            "try:\n    main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
            "assert not {'torch', 'mergekit', 'transformers'} & set(sys.modules)\n",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for command in ("card", "compare", "doctor", "report"):
        assert command in done.stdout
    version = CliRunner().invoke(main, ["--version"])
    assert version.output == f"mergekit-karcher, version {mergekit_karcher.__version__}\n"


@pytest.mark.parametrize("command", ["card", "compare", "doctor", "report"])
def test_every_command_has_help_with_examples_and_levels(command):
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert "Examples:\n" in result.output
    assert f"  mergekit-karcher {command}" in result.output
    assert "-v" in result.output
    assert "--quiet" in result.output
    if command == "report":
        assert "--lora-merge-cache" in result.output
        assert "--out-shard-size" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [["unknown"], ["report"], ["report", "--unknown", "x"], ["card", "/nowhere"], ["doctor", "x"]],
)
def test_wrong_usage_exits_with_two(arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_a_misspelt_command_gets_its_near_name():
    result = CliRunner().invoke(main, ["raport", "config.yml"])
    assert (result.exit_code, "did you mean report?" in result.stderr) == (2, True)
    assert "did you mean" not in CliRunner().invoke(main, ["zzz"]).stderr


def test_an_exception_from_below_becomes_a_sentence(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("first line\nsecond line")

    config = tmp_path / "c.yml"
    config.write_text("{}")
    monkeypatch.setattr("mergekit_karcher.cli.report.report_on", fail)
    result = CliRunner().invoke(main, ["report", str(config)])
    said = (
        "Error: report met an error that it does not know (OSError: first line); -vv shows where."
    )
    assert (result.exit_code, result.stderr) == (1, said + "\n")


def test_doctor_in_a_sound_installation():
    done = shell("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mergekit-yaml runs this package's karcher." in done.stdout
    assert f"Karcher Mean (mergekit-karcher {mergekit_karcher.__version__})" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MERGEKIT_KARCHER", "0", "MERGEKIT_KARCHER=0 is set"),
        ("TORCH_DEVICE_BACKEND_AUTOLOAD", "0", "switches torch's autoload off"),
    ],
)
def test_doctor_names_the_switch_that_keeps_us_out(name, value, words):
    done = shell("doctor", "--json", **{name: value})
    assert done.returncode == 1
    findings = json.loads(done.stdout)
    assert findings["active"] is False
    assert findings["method"] == "Karcher Mean"
    (problem,) = findings["problems"]
    assert words in problem
    assert "unset it" in problem
    quiet = shell("doctor", "--quiet", **{name: value})
    assert (quiet.stdout, quiet.stderr) == ("", f"{problem}\n")


SOUND = {
    "versions": {"mergekit-karcher": "0.1.0", "mergekit": "0.1.5", "torch": "2.13.0"},
    "entry point": True,
    "hook": True,
    "device": "cpu",
    "method": "Karcher Mean",
    "module": "mergekit.merge_methods.base",
    "python": ["python", "3.11.7"],
}
REFUSED = {"refusal": "merge_method: karcher cannot run: it does not fit; set MERGEKIT_KARCHER=0."}
PROBLEMS = {
    "elsewhere": ({"mergekit-karcher": None}, {}, "runs in another environment", "pip install"),
    "no mergekit": ({"mergekit": None}, {"error": "ModuleNotFoundError"}, "no mergekit", "install"),
    "too old": ({"mergekit": "0.1.4"}, {}, "0.1.4 is too old", "'mergekit>=0.1.5,<0.2'"),
    "too new": ({"mergekit": "0.2.0"}, {}, "0.2.0 is newer", "upgrade mergekit-karcher"),
    "between": ({"mergekit": "0.1.10"}, {"module": "rival"}, "another plugin has taken", ""),
    "alpha": ({"mergekit": "0.2.0a1"}, {}, "0.2.0a1 is newer", "upgrade mergekit-karcher"),
    "no torch": ({"torch": None}, {}, "torch is not installed", "'torch>=2.5'"),
    "old torch": ({"torch": "2.4.1"}, {}, "torch 2.4.1 has no autoload", "'torch>=2.5'"),
    "no entry": ({}, {"entry point": False}, "without its entry point", "--force-reinstall"),
    "broken": ({}, {"error": "ImportError: x"}, "does not start there: ImportError: x", ""),
    "refused": (
        {},
        {"module": "mergekit_karcher.host.install", **REFUSED},
        "cannot run: it",
        "set",
    ),
    "rival": ({}, {"module": "rival"}, "another plugin has taken its place", "karcher_mean"),
}


def test_the_metadata_asks_for_the_versions_that_are_supported():
    asked = [Requirement(line) for line in metadata.requires("mergekit-karcher")]
    ranges = {requirement.name: requirement.specifier for requirement in asked}
    assert ranges["mergekit"] == SUPPORTED
    assert str(ranges["torch"]) == ">=2.5"


@pytest.mark.parametrize("case", PROBLEMS)
def test_every_reason_has_its_sentence_and_its_cure(case, tmp_path, monkeypatch):
    """mergekit-yaml belongs to an interpreter that answers as one in that state would."""
    versions, rest, words, cure = PROBLEMS[case]
    answer = {**SOUND, **rest, "versions": SOUND["versions"] | versions}
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    executable(python, f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    executable(tmp_path / "bin" / "mergekit-yaml", f"#!{python}\n")
    monkeypatch.setenv("PATH", str(python.parent))
    monkeypatch.delenv("MERGEKIT_KARCHER", raising=False)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    problem = next(line for line in result.output.splitlines() if line.startswith("- "))
    assert words in problem
    assert cure in problem
    assert sum(line.startswith("- ") for line in result.output.splitlines()) == 1


def test_no_mergekit_yaml_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "mergekit-yaml is neither on the PATH nor beside" in result.output


def test_an_interpreter_that_does_not_run(tmp_path, monkeypatch):
    executable(tmp_path / "mergekit-yaml", "#!/nowhere/bin/python\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "/nowhere/bin/python, which runs mergekit-yaml, has no mergekit" in result.output


@pytest.mark.parametrize(
    "start",
    [
        "#!/opt/x y/bin/python3.11\n",
        "#!/bin/sh\n'''exec' \"/opt/x y/bin/python3.11\" \"$0\" \"$@\"\n' '''\n",
        "#!/bin/sh\n'''exec' '/opt/x y/bin/python3.11' \"$0\" \"$@\"\n' '''\n",
    ],
)
def test_interpreters_of_scripts(start, tmp_path):
    script = tmp_path / "mergekit-yaml"
    script.write_text(f"{start}import x\n")
    assert doctor._interpreter(script) == "/opt/x y/bin/python3.11"


@pytest.mark.parametrize("how", ["/usr/bin/env ", "/usr/bin/env -S "])
def test_an_interpreter_that_is_looked_for_on_the_path(how, tmp_path, monkeypatch):
    executable(tmp_path / "python9", "")
    script = tmp_path / "mergekit-yaml"
    script.write_text(f"#!{how}python9\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._interpreter(script) == str(tmp_path / "python9")


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
