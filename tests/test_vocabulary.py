"""Tokens that the base does not have, in merges around it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from configs import config_for
from conftest import llama, weights_of
from inputs import ambient_mean
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

WORDS = 63  # of the base; the models have two more, the same


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A base, and two fine-tunes of it with two more tokens."""
    folder = tmp_path_factory.mktemp("vocabulary")
    base = llama(folder / "base", 0, dtype=torch.float32)
    first = llama(folder / "first", 1, extra_words=2, dtype=torch.float32)
    second = Path(shutil.copytree(first, folder / "second"))
    generator = torch.Generator().manual_seed(2)
    for file in second.glob("*.safetensors"):
        tensors = load_file(file)
        changed = {n: t + torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
        save_file(changed, file, metadata={"format": "pt"})
    return base, [first, str(second)]


def config_around(tuned, **settings):
    base, models = tuned
    return config_for(
        models, [1, 2], base, origin="base", tokenizer={"source": "union"}, **settings
    )


def vocabulary_tensors(tuned):
    """The embeddings and the head of base and models, with the tokens in the base's order."""
    base, models = tuned
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield name, *[weights_of(path)[name].double() for path in (base, *models)]


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_they_get_the_weighted_linear_mean(tuned, merge, granularity):
    outcome = merge(config_around(tuned, granularity=granularity))
    ids = AutoTokenizer.from_pretrained(outcome.out).get_vocab()
    before = AutoTokenizer.from_pretrained(tuned[1][0]).get_vocab()
    extra = sorted(set(before) - set(AutoTokenizer.from_pretrained(tuned[0]).get_vocab()))
    assert len(extra) == 2
    common = sorted(set(before) - set(extra), key=before.get)
    for name, base, first, second in vocabulary_tensors(tuned):
        merged = outcome.weights[name].double()
        for token in extra:
            linear = (first[before[token]] + 2 * second[before[token]]) / 3
            torch.testing.assert_close(merged[ids[token]], linear, rtol=1e-6, atol=1e-7)
        old, new = [before[t] for t in common], [ids[t] for t in common]
        assert old == list(range(WORDS))
        differences = [first[old] - base[old], second[old] - base[old]]
        if granularity == "tensor":
            mean = ambient_mean([d.numpy().ravel() for d in differences], [1, 2])
            mean = torch.as_tensor(mean).view_as(base)
        else:
            rows = zip(*differences, strict=True)
            means = [ambient_mean([row.numpy() for row in pair], [1, 2]) for pair in rows]
            mean = torch.as_tensor(means)
        torch.testing.assert_close(merged[new], base[old] + mean, rtol=1e-5, atol=1e-6)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        line = f"tokens that the base lacks, merged by the linear mean: 2 of {name}"
        assert line in outcome.output


def test_they_do_not_count_in_a_whole_model(tuned, merge):
    """The coefficients are those of the models without the tokens."""
    outcome = merge(config_around(tuned, granularity="model"))
    base, models = (weights_of(tuned[0]), [weights_of(path) for path in tuned[1]])
    whole = [
        torch.cat([(m[n][: len(t)] - t).double().ravel() for n, t in base.items()]) for m in models
    ]
    expected = torch.as_tensor(ambient_mean([vector.numpy() for vector in whole], [1, 2]))
    merged = torch.cat(
        [(outcome.weights[n][: len(t)].double() - t).ravel() for n, t in base.items()]
    )
    ids = AutoTokenizer.from_pretrained(outcome.out).get_vocab()
    before = AutoTokenizer.from_pretrained(tuned[0]).get_vocab()
    assert all(ids[token] == place for token, place in before.items())
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


def test_a_token_that_the_config_gives_the_base_counts(tuned, merge):
    """Then there is a difference from it."""
    tokens = {"m1x0": {"source": tuned[1][0]}, "m1x1": {"source": tuned[1][0]}}
    config = config_around(tuned)
    config["tokenizer"]["tokens"] = tokens
    assert "tokens that the base lacks" not in merge(config).output


def test_around_zero_all_tokens_count(tuned, merge):
    config = config_around(tuned)
    config["parameters"]["origin"] = "zero"
    assert "tokens that the base lacks" not in merge(config).output
