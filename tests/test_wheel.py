"""The wheel, in an environment that has never seen the sources: an entry point needs an install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import weights_of

import mergekit_karcher

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The bin folder of a fresh virtual environment with the wheel and what it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    bin_ = folder / "venv" / "bin"
    constraints = ROOT / "constraints.txt"
    run(bin_ / "python", "-m", "pip", "install", "-q", "-c", constraints, wheel, cwd=folder)
    return bin_


def run(*command, cwd, **settings):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_merges_with_mergekit_yaml(environment, three_models, tmp_path):
    where = run(
        environment / "python",
        "-c",
        "import mergekit_karcher; print(mergekit_karcher.__file__)",
        cwd=tmp_path,
    )
    assert where.startswith(str(environment.parent))
    config = tmp_path / "c.yml"
    models = [{"model": model} for model in three_models]
    config.write_text(yaml.safe_dump({"merge_method": "karcher", "models": models}))
    output = run(environment / "mergekit-yaml", config, "out", cwd=tmp_path)
    assert "karcher out: 30 tensors merged" in output
    assert weights_of(tmp_path / "out").keys() == weights_of(three_models[0]).keys()
    version = f"mergekit-karcher {mergekit_karcher.__version__}"
    assert version in (tmp_path / "out" / "README.md").read_text()

    ours = environment / "mergekit-karcher"
    path = f"{environment}{os.pathsep}{os.environ['PATH']}"
    assert "mergekit-yaml runs this package's karcher." in run(
        ours, "doctor", cwd=tmp_path, PATH=path
    )
    # The wheel alone brings no matplotlib.
    output = run(ours, "report", config, "--out", "geometry", cwd=tmp_path)
    assert "These three models are" in " ".join(output.split())
    assert "pip install 'mergekit-karcher[report]' adds them" in output
    assert (tmp_path / "geometry" / "report.json").is_file()

    output = run(
        environment / "mergekit-yaml", config, "theirs", cwd=tmp_path, MERGEKIT_KARCHER="0"
    )
    assert "tensors merged" not in output
    assert version not in (tmp_path / "theirs" / "README.md").read_text()
