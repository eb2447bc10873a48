"""Each architecture is merged whole and loads again, or is refused before its weights are read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, missing_keys, write
from configs import config_for
from conftest import weights_of
from inputs import ambient_mean

# What mergekit 0.1.5 cannot plan whole, with words of the reason.
REFUSED = {
    "deepseek_v3": "lacks 12 tensors that every model has",
    "vit": "lacks 32 tensors that every model has",
    "whisper": "what no model has (model.decoder",
    "bert (masked language model)": "what no model has (bert.pooler.dense.weight, ",
    "clip": "get_input_embeddings",
    "bert": "can only concatenate",
}
GEOMETRIES = [
    (granularity, origin)
    for granularity in ("tensor", "row", "model")
    for origin in ("zero", "base")
]

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def models(request, tmp_path_factory):
    """An architecture, and a base and two models of it."""
    folder = tmp_path_factory.mktemp("models")
    paths = [write(request.param, folder / str(seed), seed) for seed in range(3)]
    return request.param, paths


def assert_refused(architecture, result):
    assert result.exit_code == 1
    assert REFUSED[architecture] in result.output


def test_merged_and_loaded(models, merge):
    """Every tensor of the inputs is in the output, and the network misses none."""
    architecture, (base, *paths) = models
    for granularity, origin in GEOMETRIES:
        config = config_for(
            paths,
            base=base if origin == "base" else None,
            granularity=granularity,
            origin=origin,
            out_dtype="bfloat16",
        )
        outcome = merge(config, name=f"{granularity}-{origin}")
        if architecture in REFUSED:
            assert_refused(architecture, outcome)
            assert not outcome.out.exists()
            continue
        assert missing_keys(architecture, outcome.out) == set()
        size = sum(tensor.numel() for tensor in outcome.weights.values())
        assert size == sum(tensor.numel() for tensor in weights_of(base).values())


def test_the_values_are_those_of_the_mean(models, merge):
    architecture, (_, *paths) = models
    if architecture in REFUSED:
        return
    inputs = [weights_of(path) for path in paths]
    outcome = merge(config_for(paths, [1, 2]))
    compared = 0
    for name, merged in outcome.weights.items():
        # Experts are stacked when they are read.
        if name in inputs[0]:
            tensors = [tensors[name].double() for tensors in inputs]
            expected = ambient_mean([tensor.numpy().ravel() for tensor in tensors], [1, 2])
            expected = torch.as_tensor(expected).view_as(merged)
            torch.testing.assert_close(merged.double(), expected, rtol=2e-6, atol=1e-7)
            compared += 1
    assert compared > 10


def test_reported(models, cli):
    architecture, (_, *paths) = models
    result = cli("report", config=config_for(paths))
    if architecture in REFUSED:
        assert_refused(architecture, result)
    else:
        assert result.exit_code == 0, result.output


def test_the_documentation_says_so():
    page = Path(__file__).parent.parent / "docs" / "architectures.md"
    rows = re.findall(r"^\| ([\w().\- ]+?) \| (merged|refused)", page.read_text(), re.MULTILINE)
    said = dict(rows)
    assert said == {name: "refused" if name in REFUSED else "merged" for name in ARCHITECTURES}
