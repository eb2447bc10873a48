"""Run mergekit's own test suite without the plugin and with it, and compare.

    python tests/mergekit_suite/run.py

Every test that passes without the plugin must pass with it, but for those that pin the built-in's
zeros, and so must every test that only the plugin's methods add. The tests come from the source
archive of the mergekit that is installed, which is downloaded from PyPI; the tests themselves need
no network. Exit status 1 if anything differs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

# They demand that a tensor whose norm is below `tol` becomes zeros; ours merges it (README).
_PINS_ZEROS = re.compile(
    r"test_merge_method_regressions\.test_karcher_below_tolerance_keeps_zero_gradients"
    r"\[\w+-1e-07-dtype[01]\]"
)

# One test runs every registered method with its defaults. That ours are among them shows that the
# second run had the plugin.
_DEMANDED = {
    "test_merge_method_regressions."
    f"test_state_dict_methods_accept_strided_weights_without_mutation[{method}]"
    for method in ("karcher", "karcher_mean", "fisher")
}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        _download_suite(Path(folder))
        runs = [_start(Path(folder), plugin) for plugin in (False, True)]
        without, with_plugin = (_outcomes(Path(folder), *run) for run in runs)
        problems = list(_problems(without, with_plugin))
        if problems:
            print((Path(folder) / "True.log").read_text())
    for name, outcomes in (("without", without), ("with", with_plugin)):
        counts = {what: [*outcomes.values()].count(what) for what in sorted({*outcomes.values()})}
        print(f"{name} the plugin: {', '.join(f'{n} {what}' for what, n in counts.items())}")
    print(*problems or ["As many pass with the plugin, but for those that pin zeros."], sep="\n")
    return 1 if problems else 0


def _download_suite(folder: Path) -> None:
    mergekit = f"mergekit=={version('mergekit')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), mergekit], check=True)
    (archive,) = folder.glob("*.tar.gz")
    # Not its package: Python would import that one instead of the one that is installed.
    tests = folder / "tests"
    tests.mkdir()
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            path = Path(member.name)
            if path.parent.name == "tests" and path.suffix == ".py":
                (tests / path.name).write_bytes(source.extractfile(member).read())
    if not (tests / "common.py").exists():
        shutil.copyfile(Path(__file__).parent / "common.py", tests / "common.py")


def _start(folder: Path, plugin: bool) -> tuple[bool, subprocess.Popen]:
    command = [sys.executable, "-m", "pytest", "tests", "--junitxml", f"{plugin}.xml"]
    environment = os.environ | {"MERGEKIT_KARCHER": str(int(plugin)), "HF_HUB_OFFLINE": "1"}
    with open(folder / f"{plugin}.log", "w") as log:
        options = ["-p", "no:cacheprovider", "--tb", "short"]
        return plugin, subprocess.Popen(
            [*command, *options], cwd=folder, env=environment, stdout=log, stderr=log
        )


def _outcomes(folder: Path, plugin: bool, process: subprocess.Popen) -> dict[str, str]:
    """How each test ended: passed, failed, error or skipped."""
    if process.wait() > 1:
        sys.exit(f"mergekit's suite did not run:\n{(folder / f'{plugin}.log').read_text()}")
    outcomes = {}
    for case in ET.parse(folder / f"{plugin}.xml").iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}".removeprefix("tests.")
        ends = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[name] = {"failure": "failed"}.get(ends[0], ends[0]) if ends else "passed"
    return outcomes


def _problems(without: dict[str, str], with_plugin: dict[str, str]):
    for name in sorted(without | with_plugin):
        before, after = (run.get(name, "absent") for run in (without, with_plugin))
        if _PINS_ZEROS.fullmatch(name):
            if after == "passed":
                yield f"{name} passes with the plugin: it need not be an exception any more."
        elif before == "absent":
            if after not in ("passed", "skipped"):
                yield f"{name}, which the plugin adds: {after}"
        elif before == "passed" != after:
            yield f"{name}: passed without the plugin, {after} with it"
    for name in sorted(_DEMANDED - with_plugin.keys()):
        yield f"{name} did not run: the plugin was not there, or the test has a new name."


if __name__ == "__main__":
    sys.exit(main())
