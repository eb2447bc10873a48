"""`mergekit-karcher doctor`: which karcher would mergekit-yaml run, and why."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table

from mergekit_karcher import __version__
from mergekit_karcher.cli.main import examples, logged
from mergekit_karcher.host.compat import SUPPORTED

# What pip is to install, the lower end of the range first.
_REQUIREMENT = f"mergekit{','.join(sorted(map(str, SUPPORTED), reverse=True))}"

# The versions of torch that call entry points when they are imported.
_TORCH = SpecifierSet(">=2.5", prereleases=True)

# Run in the interpreter of mergekit-yaml, with the modules that it would import: only a fresh
# process tells what happens in one. Its first path is dropped, since commands do not have it.
_PROBE = """
import sys
sys.path.pop(0)
import importlib.metadata, json
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
names = ("mergekit-karcher", "mergekit", "torch", "transformers", "safetensors")
answer = {"versions": {name: version(name) for name in names}}
answer["python"] = [sys.executable, sys.version.split()[0]]
try:
    entries = importlib.metadata.entry_points(group="torch.backends", name="mergekit_karcher")
    answer["entry point"] = bool(list(entries))
    import torch
    ours = "mergekit_karcher.host.import_hooks"
    answer["hook"] = any(type(finder).__module__ == ours for finder in sys.meta_path)
    answer["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    import mergekit.scripts.run_yaml
    from mergekit.merge_methods import get
    method = get("karcher")
    answer["method"] = method.spec.pretty_name or method.spec.name
    answer["module"] = type(method).__module__
    if answer["module"] == "mergekit_karcher.host.install":
        try:
            method.refuse()
        except RuntimeError as error:
            answer["refusal"] = str(error)
except BaseException as error:
    answer["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print("\\n" + json.dumps(answer))
"""


@click.command(
    "doctor", epilog=examples("mergekit-karcher doctor", "mergekit-karcher doctor --json")
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@logged
@click.pass_context
def main(context: click.Context, as_json: bool, quiet: bool) -> None:
    """Say which implementation of karcher mergekit-yaml would run, and why.

    Exit status 0 if it is this package's, 1 if not.
    """
    findings = diagnose()
    if as_json:
        click.echo(json.dumps(findings, indent=2))
    elif not quiet:
        _show(findings)
    elif findings["problems"]:
        click.echo("\n".join(findings["problems"]), err=True)
    context.exit(0 if findings["active"] else 1)


def diagnose() -> dict[str, Any]:
    """Find out which karcher mergekit-yaml would run.

    Returns:
        What `doctor --json` prints. "active": whether it is this package's. "problems": a sentence
        with the cure for each reason why not. "versions": of each package, None where it is not
        installed. The rest is what the interpreter of mergekit-yaml says of itself.
    """
    script = _mergekit_yaml()
    if script is None:
        problem = (
            f"mergekit-yaml is neither on the PATH nor beside {sys.executable}: "
            f"{sys.executable} -m pip install '{_REQUIREMENT}'"
        )
        return {"active": False, "problems": [problem], "versions": {}}
    python = _interpreter(script)
    findings = _probe(python)
    active = findings.get("module") == "mergekit_karcher.host.methods"
    problems = [] if active else [*_problems(findings, python)]
    return {"active": active, "problems": problems, "mergekit-yaml": str(script), **findings}


def _problems(findings: Mapping[str, Any], python: str) -> Iterator[str]:
    versions = findings["versions"]
    install = f"{python} -m pip install"
    if versions.get("mergekit") is None:
        yield (
            f"{python}, which runs mergekit-yaml, has no mergekit ({findings.get('error')}): "
            f"{install} '{_REQUIREMENT}'"
        )
        return
    if versions["mergekit-karcher"] is None:
        yield (
            f"mergekit-yaml runs in another environment, that of {python}, where mergekit-karcher "
            f"is not installed: {install} mergekit-karcher"
        )
        return
    reasons = [*_version_problems(versions, install), *_start_problems(findings, install)]
    yield from reasons
    if "error" in findings:
        yield f"mergekit does not start there: {findings['error']}"
    elif reasons:
        return
    elif "refusal" in findings:
        yield findings["refusal"]
    else:
        yield (
            f"karcher is {findings['method']!r} of {findings['module']}: another plugin has taken "
            "its place; uninstall that one, or use merge_method: karcher_mean."
        )


def _version_problems(versions: Mapping[str, str | None], install: str) -> Iterator[str]:
    mergekit, torch = versions["mergekit"], versions["torch"]
    if mergekit is not None and mergekit not in SUPPORTED:
        if any(end.operator == ">=" and mergekit not in end for end in SUPPORTED):
            yield f"mergekit {mergekit} is too old: {install} '{_REQUIREMENT}'"
        else:
            yield (
                f"mergekit {mergekit} is newer than this mergekit-karcher knows: upgrade "
                f"mergekit-karcher, or {install} '{_REQUIREMENT}'"
            )
    if torch is None or torch not in _TORCH:
        what = "torch is not installed" if torch is None else f"torch {torch} has no autoload"
        yield f"{what}: {install} 'torch{_TORCH}'"


def _start_problems(findings: Mapping[str, Any], install: str) -> Iterator[str]:
    """What keeps torch from starting the plugin."""
    if os.environ.get("MERGEKIT_KARCHER") == "0":
        yield "MERGEKIT_KARCHER=0 is set and asks for mergekit's own karcher: unset it."
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    if autoload != "1":
        yield (
            f"TORCH_DEVICE_BACKEND_AUTOLOAD={autoload} is set and switches torch's autoload off, "
            "so that torch does not start this plugin: unset it, or call "
            "mergekit_karcher.register() in your own programs."
        )
    if not findings.get("entry point", True):
        yield (
            "mergekit-karcher is installed without its entry point, so that torch does not start "
            f"it: {install} --force-reinstall mergekit-karcher"
        )


def _mergekit_yaml() -> Path | None:
    """The script that the shell would run, or else the one of this environment."""
    on_path = shutil.which("mergekit-yaml")
    beside = shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent))
    script = on_path or beside
    return Path(script) if script else None


def _interpreter(script: Path) -> str:
    """The Python that a console script runs in, by its first lines or its place."""
    with script.open("rb") as file:
        start = file.read(1024).decode("utf-8", "replace")
    # Where the path is long, the first line is a shell's, and the second has the path in quotes.
    first = re.match(r"#!(?:/bin/sh\s+\S*exec' )?[\"']?([^\"'\n]*python[^\"'\s]*)", start)
    python = first[1].strip() if first else ""
    by_name = re.fullmatch(r"\S*/env (?:-S )?(\S+)", python)
    if by_name:
        python = shutil.which(by_name[1]) or ""
    beside = shutil.which("python", path=str(script.parent))
    return python or beside or sys.executable


def _probe(python: str) -> dict[str, Any]:
    """What an interpreter says of itself."""
    try:
        done = subprocess.run(
            [python, "-c", _PROBE], capture_output=True, text=True, check=False, timeout=600
        )
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired) as error:
        return {"versions": {}, "error": str(error)}
    return answer


def _show(findings: Mapping[str, Any]) -> None:
    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None)
    rows: dict[str, Any] = {"this command": __version__, **findings["versions"]}
    if "python" in findings:
        rows |= {"Python": findings["python"][1], "device": findings.get("device")}
        rows["mergekit-yaml"] = findings["mergekit-yaml"]
        rows["hook"] = "in place" if findings.get("hook") else "not in place"
        rows["karcher"] = findings.get("method", "not there")
    for name, value in rows.items():
        table.add_row(name, "not installed" if value is None else str(value))
    console.print(table)
    if findings["active"]:
        console.print("mergekit-yaml runs this package's karcher.", style="green")
    for problem in findings["problems"]:
        console.print(f"- {problem}", markup=False, highlight=False)
