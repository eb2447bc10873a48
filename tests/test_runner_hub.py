"""Models of the Hub are checked by their headers, before any weights are fetched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from configs import config_for
from conftest import llama, weights_of
from hub import Hub

# Of one matrix; the client asks for the first 100 kB of a file to read its header.
NEURONS = 1 << 15
OTHER_NEURONS = NEURONS + 64


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of two models that fit together, and of one with a few neurons more."""
    folder = tmp_path_factory.mktemp("hub")
    sizes = {"a": NEURONS, "b": NEURONS, "wide": OTHER_NEURONS}
    return {
        name: llama(folder / name, seed, num_hidden_layers=1, intermediate_size=size)
        for seed, (name, size) in enumerate(sizes.items())
    }


class Merging:
    """Our command in fresh processes with an empty cache, and a Hub that has the models."""

    def __init__(self, folder, hub, models):
        self.folder, self.hub, self.out = folder, hub, folder / "merged"
        for name, path in models.items():
            hub.repos[f"me/{name}"] = {p.name: p.read_bytes() for p in Path(path).iterdir()}

    def run(self, models, *options):
        config = self.folder / "config.yml"
        config.write_text(yaml.safe_dump(config_for(models)))
        command = ["merge", config, self.out, "--transformers-cache", self.folder / "cache"]
        return subprocess.run(
            [Path(sys.executable).parent / "mergekit-karcher", *map(str, (*command, *options))],
            env=os.environ | self.hub.environment(self.folder / "home"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=300,
        )

    @property
    def matrices_sent(self):
        """For each file with a large matrix, what part of it was sent, if any was."""
        sent = Counter()
        for path, count in self.hub.sent:
            model, revision_and_file = path.split("/resolve/")
            file = revision_and_file.split("/", 1)[1]
            size = len(self.hub.repos[model][file])
            if file.endswith(".safetensors") and size > 1 << 20:
                sent[model, file] += count / size
        return sent


@pytest.fixture
def merging(tmp_path, models):
    with Hub() as hub:
        yield Merging(tmp_path, hub, models)


def test_a_model_that_does_not_fit_is_refused_by_its_headers(merging):
    done = merging.run(["me/a", "me/wide"])
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    (error,) = [line for line in done.stdout.splitlines() if line.startswith("Error: ")]
    for words in ("mlp.", f"[{NEURONS}, 32]", f"[{OTHER_NEURONS}, 32]"):
        assert words in error, error
    assert len(merging.matrices_sent) == 6
    assert max(merging.matrices_sent.values()) < 0.06
    assert not merging.out.exists()


def test_a_local_file_that_is_cut_short_is_seen_before_others_are_fetched(merging, models):
    local = shutil.copytree(models["b"], merging.folder / "local")
    spoilt = local / "model-00002-of-00004.safetensors"
    os.truncate(spoilt, spoilt.stat().st_size - 2)
    done = merging.run(["me/a", str(local)])
    assert done.returncode == 1
    assert f"Error: {spoilt} is " in done.stdout
    assert len(merging.matrices_sent) == 3
    assert max(merging.matrices_sent.values()) < 0.06


def test_a_dry_run_names_what_it_would_fetch(merging):
    done = merging.run(["me/a", "me/b"], "--dry-run")
    assert done.returncode == 0, done.stdout
    assert "To be fetched from the Hub first: me/a, me/b." in done.stdout
    assert "units, each done as a whole:" in done.stdout
    assert max(merging.matrices_sent.values()) < 0.06
    assert not merging.out.exists()


def test_the_tensors_are_those_of_local_folders(merging, models, merge):
    done = merging.run(["me/a", "me/b"])
    assert done.returncode == 0, done.stdout
    local = merge(config_for([models["a"], models["b"]])).weights
    fetched = weights_of(merging.out)
    assert fetched.keys() == local.keys()
    assert all(torch.equal(fetched[name], local[name]) for name in local)
    before = len(merging.hub.sent)
    again = merging.run(["me/a", "me/b"], "--overwrite", "--dry-run")
    assert "To be fetched" not in again.stdout
    assert len(merging.hub.sent) == before
