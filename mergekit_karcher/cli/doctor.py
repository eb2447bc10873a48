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
from rich.console import Console
from rich.table import Table

from mergekit_karcher import __version__
from mergekit_karcher.cli.main import examples, logged
from mergekit_karcher.host.install import FIRST_UNTESTED_MERGEKIT, OLDEST_MERGEKIT

_REQUIREMENT = "mergekit>=0.1.5,<0.2"

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
found = {"versions": {name: version(name) for name in names}}
found["python"] = [sys.executable, sys.version.split()[0]]
try:
    entries = importlib.metadata.entry_points(group="torch.backends", name="mergekit_karcher")
    found["entry point"] = bool(list(entries))
    import torch
    ours = "mergekit_karcher.host.import_hooks"
    found["hook"] = any(type(finder).__module__ == ours for finder in sys.meta_path)
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    import mergekit.scripts.run_yaml
    from mergekit.merge_methods import get
    method = get("karcher")
    found["method"] = method.spec.pretty_name or method.spec.name
    found["module"] = type(method).__module__
except BaseException as error:
    found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print("\\n" + json.dumps(found))
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
    found = diagnose()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif not quiet:
        _show(found)
    elif found["problems"]:
        click.echo("\n".join(found["problems"]), err=True)
    context.exit(0 if found["active"] else 1)


def diagnose() -> dict[str, Any]:
    """What is installed where mergekit-yaml runs, and a sentence with the cure for each problem."""
    script = _mergekit_yaml()
    if script is None:
        problem = (
            f"mergekit-yaml is neither on the PATH nor beside {sys.executable}: "
            f"{sys.executable} -m pip install '{_REQUIREMENT}'"
        )
        return {"active": False, "problems": [problem], "versions": {}}
    python = _interpreter(script)
    found = _probed(python)
    active = found.get("module") == "mergekit_karcher.host.methods"
    problems = [] if active else [*_problems(found, python)]
    return {"active": active, "problems": problems, "mergekit-yaml": str(script), **found}


def _problems(found: Mapping[str, Any], python: str) -> Iterator[str]:
    versions = found["versions"]
    install = f"{python} -m pip install"
    if versions.get("mergekit") is None:
        yield (
            f"{python}, which runs mergekit-yaml, has no mergekit ({found.get('error')}): "
            f"{install} '{_REQUIREMENT}'"
        )
        return
    if versions["mergekit-karcher"] is None:
        yield (
            f"mergekit-yaml runs in another environment, that of {python}, where mergekit-karcher "
            f"is not installed: {install} mergekit-karcher"
        )
        return
    reasons = [*_reasons(found, install)]
    yield from reasons
    if "error" in found:
        yield f"mergekit does not start there: {found['error']}"
    elif not reasons:
        yield (
            f"karcher is {found['method']!r} of {found['module']}: another plugin has taken its "
            "place; uninstall that one, or use merge_method: karcher_mean."
        )


def _reasons(found: Mapping[str, Any], install: str) -> Iterator[str]:
    versions = found["versions"]
    mergekit = _numbers(versions["mergekit"])
    if mergekit < OLDEST_MERGEKIT:
        yield f"mergekit {versions['mergekit']} is too old: {install} '{_REQUIREMENT}'"
    elif mergekit >= FIRST_UNTESTED_MERGEKIT:
        yield (
            f"mergekit {versions['mergekit']} is newer than this mergekit-karcher knows: upgrade "
            f"mergekit-karcher, or {install} '{_REQUIREMENT}'"
        )
    if os.environ.get("MERGEKIT_KARCHER") == "0":
        yield "MERGEKIT_KARCHER=0 is set and asks for mergekit's own karcher: unset it."
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    if autoload != "1":
        yield (
            f"TORCH_DEVICE_BACKEND_AUTOLOAD={autoload} is set and switches torch's autoload off, "
            "which starts the plugin: unset it, or call mergekit_karcher.register() in programs of "
            "your own."
        )
    if _numbers(versions["torch"] or "0") < (2, 5):
        yield f"torch {versions['torch']} has no autoload: {install} 'torch>=2.5'"
    if not found.get("entry point", True):
        yield (
            "mergekit-karcher is there without its entry point, so that torch does not start it: "
            f"{install} --force-reinstall mergekit-karcher"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _mergekit_yaml() -> Path | None:
    """The script that the shell would run, or else the one of this environment."""
    on_path = shutil.which("mergekit-yaml")
    beside = shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent))
    found = on_path or beside
    return Path(found) if found else None


def _interpreter(script: Path) -> str:
    """The Python that a console script runs in, by its first lines or its place."""
    with script.open("rb") as file:
        start = file.read(1024).decode("utf-8", "replace")
    # Where the path is long, the first line is a shell's, and the second has the path in quotes.
    first = re.match(r"#!(?:/bin/sh\s+\S*exec' )?[\"']?([^\"'\n]*python[^\"'\s]*)", start)
    found = first[1].strip() if first else ""
    by_name = re.fullmatch(r"\S*/env (?:-S )?(\S+)", found)
    if by_name:
        found = shutil.which(by_name[1]) or ""
    beside = shutil.which("python", path=str(script.parent))
    return found or beside or sys.executable


def _probed(python: str) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [python, "-c", _PROBE], capture_output=True, text=True, check=False, timeout=600
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired) as error:
        return {"versions": {}, "error": str(error)}
    return found


def _show(found: Mapping[str, Any]) -> None:
    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None)
    rows: dict[str, Any] = {"this command": __version__, **found["versions"]}
    if "python" in found:
        rows |= {"Python": found["python"][1], "device": found.get("device")}
        rows["mergekit-yaml"] = found["mergekit-yaml"]
        rows["hook"] = "in place" if found.get("hook") else "not in place"
        rows["karcher"] = found.get("method", "not there")
    for name, value in rows.items():
        table.add_row(name, "not installed" if value is None else str(value))
    console.print(table)
    if found["active"]:
        console.print("mergekit-yaml runs this package's karcher.", style="green")
    for problem in found["problems"]:
        console.print(f"- {problem}", markup=False, highlight=False)
