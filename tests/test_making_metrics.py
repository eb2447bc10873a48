"""Metrics made from data, example by example, and from what Adam kept."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from conftest import llama, weights_of
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from mergekit_karcher import fisher_mean, karcher_mean
from mergekit_karcher.cli import fisher as command
from mergekit_karcher.cli.main import main
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.metrics import adam as optimizer_module
from mergekit_karcher.metrics import store as files_module
from mergekit_karcher.metrics.adam import Moments, adam_metric
from mergekit_karcher.metrics.diagonal import Batch, DiagonalFisher
from mergekit_karcher.metrics.examples import Example, Source, batches, read_examples

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 63,
}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "mixture": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    ),
    "llama classifier": lambda: LlamaForSequenceClassification(
        LlamaConfig(**SMALL, num_labels=3, pad_token_id=0)
    ),
    "bert classifier": lambda: BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)),
}


def made(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = KINDS[kind]().to(dtype).eval()
    model.set_attn_implementation("eager")
    return model


def examples(kind, count=6, length=9):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 63, (count, length), generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator) if "classifier" in kind else None
    return Batch(ids, labels)


def by_a_plain_loop(model, batch, targets=None):
    """The definition: the mean over examples of the squared gradient of each one's loss."""
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for index, ids in enumerate(batch.ids):
        logits = model(input_ids=ids[None]).logits[0]
        if batch.labels is None:
            loss = nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
        else:
            loss = nn.functional.cross_entropy(logits, batch.labels[index])
        model.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name] += parameter.grad**2 / len(batch.ids)
    return squares


def fisher_of(model, batch, size):
    found = DiagonalFisher(model)
    for start in range(0, len(batch.ids), size):
        labels = None if batch.labels is None else batch.labels[start : start + size]
        found.add(Batch(batch.ids[start : start + size], labels))
    return found.metric()


# The experts of a mixture multiply in float32 at most.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mixture"])
@pytest.mark.parametrize("size", [1, 4])
def test_the_fisher_is_that_of_a_plain_loop_in_every_entry(kind, size):
    model, batch = made(kind, torch.float64), examples(kind)
    expected = by_a_plain_loop(model, batch)
    found = fisher_of(model, batch, size)
    assert found.keys() == expected.keys()
    for name, own in found.items():
        torch.testing.assert_close(own.double(), expected[name], rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_every_parameter_is_right_to_five_digits(kind):
    model, batch = made(kind), examples(kind)
    reference = model if kind == "mixture" else copy.deepcopy(model).double()
    exact = by_a_plain_loop(reference, batch)
    largest = max(own.norm() for own in exact.values())
    for name, own in fisher_of(model, batch, 4).items():
        distance = (own.double() - exact[name]).norm()
        # Adding to all keys changes no softmax: their bias has a gradient of zero, and here noise.
        assert distance <= 1e-5 * exact[name].norm() + 1e-20 * largest, name


class Softmax(nn.Module):
    """A classifier of two tokens by a table: its true Fisher information is known."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.tensor([[0.3, -0.7, 1.2], [0.0, 0.4, -0.1]]).double())

    def forward(self, input_ids):
        logits = self.table[input_ids[0, 0]][None]
        return type("Output", (), {"logits": logits})


def test_the_true_fisher_draws_targets_from_the_model():
    """For logits z, E g^2 = p (1 - p): the diagonal of diag(p) - p p'."""
    model = Softmax()
    count = 20000
    batch = Batch(torch.tensor([[0, 0]]).expand(count, 2), torch.zeros(count, dtype=torch.int64))
    found = DiagonalFisher(model)
    found.add(batch, torch.Generator().manual_seed(3))
    p = model.table.detach()[0].softmax(-1)
    expected = p * (1 - p)
    # The standard error of a mean of squares of a Bernoulli difference is below 1 / sqrt(count).
    torch.testing.assert_close(
        found.metric()["table"][0].double(), expected, rtol=0, atol=4 / math.sqrt(count)
    )
    empirical = DiagonalFisher(model)
    empirical.add(batch)
    one_hot = torch.tensor([1.0, 0, 0]).double()
    torch.testing.assert_close(empirical.metric()["table"][0].double(), (p - one_hot) ** 2)


def test_true_targets_of_a_language_model_come_from_each_position():
    model, batch = made("llama"), examples("llama")
    first, again, other = (DiagonalFisher(model) for _ in range(3))
    for found, seed in ((first, 1), (again, 1), (other, 2)):
        found.add(batch, torch.Generator().manual_seed(seed))
    name = "lm_head.weight"
    assert torch.equal(first.metric()[name], again.metric()[name])
    assert not torch.equal(first.metric()[name], other.metric()[name])
    empirical = fisher_of(model, batch, 6)[name]
    assert 0.2 < first.metric()[name].mean() / empirical.mean() < 5


class Choosy(Softmax):
    """Decides by a value, which vmap cannot."""

    def forward(self, input_ids):
        sign = 1 if self.table.sum().item() + input_ids.sum().item() > 0 else -1
        output = super().forward(input_ids)
        output.logits = output.logits * sign
        return output


def test_a_model_that_cannot_be_batched_goes_one_by_one(caplog):
    model = Choosy()
    batch = Batch(torch.tensor([[0, 1], [1, 0], [1, 1]]), torch.tensor([0, 1, 2]))
    found = fisher_of(model, batch, 3)
    assert "one example after the other" in caplog.text
    expected = by_a_plain_loop(model, batch)["table"]
    torch.testing.assert_close(found["table"].double(), expected, rtol=1e-6, atol=0)


def test_batches_have_one_length_each_and_lose_nothing():
    all_examples = [Example([1] * length, length) for length in (2, 2, 2, 3, 5, 5)]
    found = list(batches(all_examples, 2))
    assert [tuple(batch.ids.shape) for batch in found] == [(2, 2), (1, 2), (1, 3), (2, 5)]
    assert [label for batch in found for label in batch.labels.tolist()] == [2, 2, 2, 3, 5, 5]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run our command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        result = CliRunner().invoke(main, ["fisher", *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


WORDS = " ".join(f"w{index * 7 % 60}" for index in range(400))


@pytest.fixture
def model(tmp_path):
    """A model in shards, and a text."""
    (tmp_path / "text.txt").write_text(WORDS)
    return llama(tmp_path / "model", 0, dtype=torch.bfloat16)


TEXT = ("--data", "text.txt", "--length", 16, "--quiet")


def test_from_a_text_to_a_merge(run, model, tmp_path, merge):
    other = llama(tmp_path / "other", 1, dtype=torch.bfloat16)
    for name, path in (("first", model), ("second", other)):
        result = run(path, *TEXT, "--out", name)
        assert result.exit_code == 0, result.output
    found = load_file(tmp_path / "first" / "model.safetensors")
    assert found.keys() == weights_of(model).keys()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = PreTrainedTokenizerFast.from_pretrained(model)(WORDS).input_ids
    windows = torch.tensor(tokens[: len(tokens) // 16 * 16]).view(-1, 16)
    expected = by_a_plain_loop(loaded, Batch(windows))
    for name, own in found.items():
        assert (own - expected[name]).norm() <= 1e-5 * expected[name].norm()
    about = json.loads((tmp_path / "first" / "metric.json").read_text())
    assert (about["examples"], about["tokens"]) == (len(windows), windows.numel())
    assert about["kind"] == "diagonal empirical Fisher information"
    config = {
        "merge_method": "fisher",
        "models": [
            {"model": path, "parameters": {"metric": str(tmp_path / name)}}
            for name, path in (("first", model), ("second", other))
        ],
        "dtype": "float32",
    }
    weights = merge(config).weights
    name = "model.layers.1.mlp.up_proj.weight"
    metrics = [load_file(tmp_path / n / "model.safetensors")[name] for n in ("first", "second")]
    inputs = [weights_of(path)[name].float() for path in (model, other)]
    assert torch.equal(weights[name], fisher_mean(inputs, metrics))


def test_an_interrupted_run_goes_on_where_it_was(run, model, tmp_path, monkeypatch):
    for options in ((), ("--true",)):
        whole, part = f"whole{len(options)}", f"part{len(options)}"
        run(model, *TEXT, *options, "--out", whole)
        calls = []
        add = DiagonalFisher.add

        def failing(self, batch, sampler=None, add=add, calls=calls):
            calls.append(len(batch.ids))
            if len(calls) == 4:
                raise KeyboardInterrupt
            add(self, batch, sampler)

        with monkeypatch.context() as patch:
            patch.setattr(command, "_SECONDS_BETWEEN_SAVES", -1)
            patch.setattr(DiagonalFisher, "add", failing)
            assert run(model, *TEXT, *options, "--out", part).exit_code == 1
            assert [path.name for path in Path(part).iterdir()] == ["partial.safetensors"]
            refused = run(model, *TEXT, *options, "--out", part, "--seed", 5)
            assert "is of a run with other seed: name" in refused.output
            assert run(model, *TEXT, *options, "--out", part).exit_code == 0
        assert sum(calls) == 25 + calls[3]
        metrics = [load_file(Path(name, "model.safetensors")) for name in (whole, part)]
        assert all(torch.equal(metrics[0][name], metrics[1][name]) for name in metrics[0])
        assert {path.name for path in Path(part).iterdir()} == {"model.safetensors", "metric.json"}
        assert f"{part} exists" in run(model, *TEXT, *options, "--out", part).output


def test_a_signal_to_stop_is_heeded_at_the_end_of_a_batch(run, model, monkeypatch):
    run(model, *TEXT, "--out", "whole")
    calls = []
    add = DiagonalFisher.add

    def asking(self, batch, sampler=None):
        calls.append(len(batch.ids))
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        add(self, batch, sampler)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(DiagonalFisher, "add", asking)
        result = run(model, *TEXT, "--out", "part")
        assert "Stopped after 5 of 25 examples, which are kept in part" in result.output
        assert signal.getsignal(signal.SIGINT) is before
        # The size of a batch may be another when it goes on.
        assert run(model, *TEXT, "--batch-size", 7, "--out", "part").exit_code == 0
    assert calls == [1] * 5 + [7, 7, 6]
    found = [load_file(Path(name, "model.safetensors")) for name in ("whole", "part")]
    for name, own in found[0].items():
        torch.testing.assert_close(found[1][name], own, rtol=1e-4, atol=1e-12)


def test_what_is_cut_off_while_it_is_written_is_no_metric(run, model, monkeypatch):
    """metric.json comes last, and what is there before it is written anew."""
    calls = []

    def failing(source, target):
        calls.append(Path(target).name)
        if len(calls) == 2:
            raise OSError("the disk is full")
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "replace", failing)
        assert "the disk is full" in run(model, *TEXT, "--out", "part").output
    assert calls == ["model.safetensors", "metric.json"]
    assert not Path("part/metric.json").exists()
    assert run(model, *TEXT, "--out", "part").exit_code == 0
    assert {path.name for path in Path("part").iterdir()} == {"model.safetensors", "metric.json"}


def test_true_targets_are_drawn_anew_for_every_example(run, model):
    Path("same.txt").write_text(" ".join(["w1 w2 w3 w4"] * 20))
    options = ("--data", "same.txt", "--length", 4, "--true", "--quiet")
    for count in (1, 20):
        assert run(model, *options, "--examples", count, "--out", f"true{count}").exit_code == 0
    one, many = (load_file(f"true{count}/model.safetensors") for count in (1, 20))
    name = "lm_head.weight"
    assert (one[name] - many[name]).norm() > 0.1 * one[name].norm()


def test_examples_come_the_shortest_first(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": " ".join(["w1"] * count)} for count in (5, 2, 4, 2, 3)]
    records("lengths.jsonl", [*rows, {"text": None}])
    source = Source("lengths.jsonl", None, "train", ["text"], "label", 4, 100, 0)
    found = read_examples(source, PreTrainedTokenizerFast.from_pretrained(model), None)
    assert [len(example.ids) for example in found] == [2, 2, 3, 4, 4]


def test_a_run_that_is_cut_off_before_its_first_save_leaves_nothing(run, model, monkeypatch):
    def stopping(self, batch, sampler=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DiagonalFisher, "add", stopping)
        assert run(model, *TEXT, "--out", "early").exit_code == 1
    assert not Path("early").exists()
    assert run(model, *TEXT, "--out", "early").exit_code == 0


def test_what_is_unfinished_is_kept_from_others_and_may_be_deleted(run, model, tmp_path):
    out = tmp_path / "part"
    out.mkdir()
    (out / "partial.safetensors").write_bytes(b"")
    result = run(model, "--from-optimizer", model, "--out", "part")
    assert "holds an unfinished run from data" in result.output
    (out / "partial.safetensors").unlink()
    (out / "model.safetensors").write_bytes(b"of somebody else")
    assert "part exists: name a new folder" in run(model, *TEXT, "--out", "part").output
    (out / "model.safetensors").unlink()
    (out / "writing").mkdir()
    assert run(model, *TEXT, "--out", "part").exit_code == 0
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "metric.json"}


def test_weights_are_told_apart_by_their_bits():
    torch.manual_seed(1)
    network, before = nn.Linear(999, 999), torch.get_num_threads()
    found = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.add(command._fingerprint(network))
    torch.set_num_threads(before)
    assert len(found) == 1
    with torch.no_grad():
        network.bias[5] = torch.nextafter(network.bias[5], torch.tensor(9.0))
    assert command._fingerprint(network) not in found


def test_gradients_that_are_not_finite_stop_the_run(run, model, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        broken.model.embed_tokens.weight[5] = torch.inf
    shutil.copytree(model, tmp_path / "broken")
    broken.save_pretrained(tmp_path / "broken", max_shard_size="20KB")
    result = run("broken", *TEXT, "--out", "metric")
    assert "The gradients of" in result.output
    assert "are not finite after" in result.output
    assert not Path("metric").exists()


@pytest.mark.parametrize("prefixed", [True, False])
def test_gpt2_checkpoints_with_and_without_the_name_of_the_trunk(run, model, tmp_path, prefixed):
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=63, n_positions=12)
    network = GPT2LMHeadModel(config).eval()
    shutil.copytree(model, tmp_path / "gpt2")
    for path in (tmp_path / "gpt2").glob("*model*"):
        path.unlink()
    network.save_pretrained(tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    if not prefixed:
        short = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
        save_file(short, file, {"format": "pt"})
    # More tokens than it has positions are cut.
    result = run("gpt2", *TEXT, "--out", "metric")
    assert result.exit_code == 0, result.output
    found = load_file("metric/model.safetensors")
    assert found.keys() == load_file(file).keys()
    tokens = PreTrainedTokenizerFast.from_pretrained(model)(WORDS).input_ids
    windows = torch.tensor(tokens[: len(tokens) // 12 * 12]).view(-1, 12)
    expected = by_a_plain_loop(network, Batch(windows))["transformer.h.1.mlp.c_fc.weight"]
    own = found[f"{'transformer.' if prefixed else ''}h.1.mlp.c_fc.weight"]
    assert (own - expected).norm() <= 1e-5 * expected.norm()


def test_a_tied_head_that_stands_alone(run, model, tmp_path):
    network = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    shutil.copytree(model, tmp_path / "tied")
    for path in (tmp_path / "tied").glob("*model*"):
        path.unlink()
    network.save_pretrained(tmp_path / "tied")
    file = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    result = run("tied", *TEXT, "--out", "metric")
    assert result.exit_code == 0, result.output
    assert load_file("metric/model.safetensors").keys() == tensors.keys()


def test_experts_that_transformers_stacks_are_named_as_in_the_checkpoint(
    run, model, tmp_path, merge
):
    mixture = made("mixture")
    shutil.copytree(model, tmp_path / "mixture")
    for path in (tmp_path / "mixture").glob("*model*"):
        path.unlink()
    mixture.save_pretrained(tmp_path / "mixture")
    result = run("mixture", *TEXT, "--out", "metric")
    assert result.exit_code == 0, result.output
    found = load_file(tmp_path / "metric" / "model.safetensors")
    own = weights_of(tmp_path / "mixture")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in own.items()}
    tokens = PreTrainedTokenizerFast.from_pretrained(model)(WORDS).input_ids
    expected = by_a_plain_loop(mixture, Batch(torch.tensor(tokens[:400]).view(-1, 16)))
    gate, up = expected["model.layers.0.mlp.experts.gate_up_proj"].chunk(2, dim=1)
    for name, part in (("w1", gate), ("w3", up)):
        tensor = found[f"model.layers.0.block_sparse_moe.experts.2.{name}.weight"]
        torch.testing.assert_close(tensor, part[2], rtol=1e-3, atol=1e-9)
    shutil.copytree("mixture", "other")
    generator = torch.Generator().manual_seed(7)
    changed = {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in own.items()}
    save_file(changed, Path("other", "model.safetensors"), {"format": "pt"})
    Path("other-metric").mkdir()
    flipped = {n: t.flip(0).contiguous() for n, t in found.items()}
    save_file(flipped, Path("other-metric", "model.safetensors"))

    def stacked(tensors):
        part = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
        return torch.stack([tensors[part.format(index)] for index in range(4)])

    inputs = [stacked(own), stacked(changed)]
    metrics = [stacked(found), stacked(flipped)]
    for method, granularity in (("fisher", ""), ("karcher", "row"), ("karcher", "model")):
        models = [
            {"model": str(tmp_path / name), "parameters": {"metric": str(tmp_path / metric)}}
            for name, metric in (("mixture", "metric"), ("other", "other-metric"))
        ]
        config = {"merge_method": method, "models": models, "dtype": "float32"}
        if granularity:
            config["parameters"] = {"granularity": granularity}
        weights = merge(config, name=f"{method}{granularity}").weights
        # mergekit 0.1.5 writes what transformers stacks as it reads it.
        merged = weights["model.layers.0.mlp.experts.down_proj"]
        if granularity == "model":
            # One pair of coefficients, which keeps the length that averaging would lose.
            columns = torch.stack([i.flatten() for i in inputs], 1).double()
            ratios = torch.linalg.lstsq(columns, merged.double().flatten()).solution
            torch.testing.assert_close(
                columns @ ratios, merged.double().flatten(), rtol=0, atol=1e-7
            )
            assert 1 < ratios.sum() < 1.5
            continue
        if method == "fisher":
            expected = fisher_mean(inputs, metrics)
        else:
            expected, _ = karcher_mean(inputs, metrics=metrics, granularity=granularity)
        assert torch.equal(merged, expected)


@pytest.fixture
def classifier(tmp_path, model):
    """A classifier of three named classes, with the tokenizer of the model."""
    folder = tmp_path / "classifier"
    shutil.copytree(model, folder)
    for path in folder.glob("*model*"):
        path.unlink()
    own = made("bert classifier")
    own.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    own.config.label2id = {"no": 0, "maybe": 1, "yes": 2}
    own.save_pretrained(folder)
    return "classifier"


def records(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_classifier_from_records(run, classifier, tmp_path):
    rows = [
        {"first": "w1 w2 w3", "second": "w4", "class": "yes"},
        {"first": "w5 w6", "second": "w7 w8", "class": "no"},
        {"first": "w5", "second": "w9", "class": "maybe"},
    ]
    records("pairs.jsonl", rows)
    options = ("--text", "first", "--text", "second", "--label", "class", "--quiet")
    result = run(classifier, "--data", "pairs.jsonl", *options, "--out", "metric")
    assert result.exit_code == 0, result.output
    found = load_file(tmp_path / "metric" / "model.safetensors")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / classifier)
    own = BertForSequenceClassification.from_pretrained(tmp_path / classifier).eval()
    expected = {name: torch.zeros_like(p) for name, p in own.named_parameters()}
    for row in rows:
        ids = torch.tensor([tokenizer(row["first"], row["second"]).input_ids])
        label = torch.tensor([own.config.label2id[row["class"]]])
        for name, squares in by_a_plain_loop(own, Batch(ids, label)).items():
            expected[name] += squares / 3
    assert found.keys() == expected.keys()
    for name, metric in found.items():
        assert (metric - expected[name]).norm() <= 1e-5 * expected[name].norm()


def test_classes_are_matched_by_name_where_a_dataset_numbers_them_otherwise(
    run, classifier, tmp_path
):
    rows = {"text": ["w1 w2", "w3 w4 w5", "w6 w7"], "label": ["yes", "no", "yes"]}
    records(
        "named.jsonl",
        [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)],
    )
    numbered = {
        "other": (["YES", "maybe", "No"], [0, 2, 0]),  # another order than the model's
        "own": (["0", "1", "2"], [2, 0, 2]),
    }
    for name, (names, labels) in numbered.items():
        kind = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        data = Dataset.from_dict({"text": rows["text"], "label": labels}, features=kind)
        Path(name).mkdir()
        data.to_parquet(f"{name}/train.parquet")
    assert run(classifier, "--data", "named.jsonl", "--quiet", "--out", "a").exit_code == 0
    assert run(classifier, "--data", "other", "--quiet", "--out", "b").exit_code == 0
    found = [load_file(Path(name, "model.safetensors")) for name in "ab"]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    result = run(classifier, "--data", "own", "--quiet", "--out", "c")
    assert "has the classes 0, 1, 2 (label), but the model no, maybe, yes" in result.output
    # A model whose classes have no names takes numbers as they are.
    config = json.loads((tmp_path / classifier / "config.json").read_text())
    unnamed = {str(index): f"LABEL_{index}" for index in range(3)}
    changed = {**config, "id2label": unnamed, "label2id": {v: int(k) for k, v in unnamed.items()}}
    (tmp_path / classifier / "config.json").write_text(json.dumps(changed))
    assert run(classifier, "--data", "own", "--quiet", "--out", "c").exit_code == 0
    found.append(load_file("c/model.safetensors"))
    assert all(torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_conversations_go_through_the_chat_template(run, model, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(model)
    records("chat.jsonl", [{"messages": [{"role": "user", "content": "w2 w3"}]}])
    records("flat.jsonl", [{"text": "w1 w2 w3"}])
    chat = ("--data", "chat.jsonl", "--text", "messages", "--quiet", "--out", "chat")
    assert run(model, *chat).exit_code == 0
    assert run(model, "--data", "flat.jsonl", "--quiet", "--out", "flat").exit_code == 0
    found = [load_file(Path(name, "model.safetensors")) for name in ("chat", "flat")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_mistakes_about_data(run, model, classifier):
    records("rows.jsonl", [{"text": "w1 w2", "label": 7, "note": None}])
    records("chat.jsonl", [{"text": [{"role": "user", "content": "w2 w3"}]}])
    Path("short.txt").write_text("w1")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("broken.jsonl").write_text('{"text": "w1 w2"}\n{"text')
    Path("empty.jsonl").write_text("")
    cases = {
        (model, "--data", "short.txt"): "holds no example: each needs at least two tokens",
        (model, "--data", "rows.jsonl", "--text", "txt"): "no column txt, but text, label, note",
        (model, "--data", "rows.jsonl", "--text", "note"): "holds no example",
        (model, "--data", "rows.jsonl", "--text", "label"): "label of rows.jsonl holds int, not",
        (model, "--data", "chat.jsonl"): "cannot be written as text",
        (model, "--data", "nowhere.jsonl"): "There is no file nowhere.jsonl",
        (model, "--data", "latin.txt"): "latin.txt is no text in UTF-8",
        (model, "--data", "broken.jsonl"): "broken.jsonl cannot be read",
        (model, "--data", "empty.jsonl"): "empty.jsonl cannot be read",
        (model, *TEXT, *("--text", "a") * 3): "Give one --text, or two",
        (classifier, "--data", "rows.jsonl"): "is of class 7 (label), but the model knows 3",
        (classifier, "--data", "text.txt"): "is a plain text, which has no classes",
        ("nowhere", "--data", "text.txt"): "nowhere is no model that transformers reads",
        (model,): "Give either --data or --from-optimizer",
        ("--data", "text.txt"): "Give one model, as the argument or by --model",
    }
    for arguments, words in cases.items():
        result = run(*arguments, "--out", "bad")
        assert (result.exit_code != 0, words in result.output) == (True, True), result.output
        assert "Traceback" not in result.output
        assert not Path("bad").exists()


def test_models_that_are_not_whole_or_have_no_such_likelihood(run, classifier, tmp_path):
    weights = weights_of(tmp_path / classifier)
    config = json.loads((tmp_path / classifier / "config.json").read_text())
    save_file(
        {n: t for n, t in weights.items() if "classifier" not in n},
        tmp_path / classifier / "model.safetensors",
        {"format": "pt"},
    )
    records("rows.jsonl", [{"text": "w1 w2", "label": 1}])
    result = run(classifier, "--data", "rows.jsonl", "--out", "bad")
    assert "lacks classifier.bias of a BertForSequenceClassification" in result.output
    wrong = {**weights, "classifier.weight": torch.zeros(5, 16)}
    save_file(wrong, tmp_path / classifier / "model.safetensors", {"format": "pt"})
    result = run(classifier, "--data", "rows.jsonl", "--out", "bad")
    assert "classifier.weight of classifier has not the shape" in result.output
    save_file(weights, tmp_path / classifier / "model.safetensors", {"format": "pt"})
    for change, words in (
        ({"problem_type": "regression"}, "made for causal language models and for classifiers"),
        ({"architectures": ["NoSuchModel"]}, "asks for NoSuchModel, which this transformers"),
    ):
        (tmp_path / classifier / "config.json").write_text(json.dumps({**config, **change}))
        result = run(classifier, "--data", "rows.jsonl", "--out", "bad")
        assert words in result.output


def train(optimizer, network, steps=3):
    """Some steps on random data; returns nothing but what the optimizer keeps."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        batch = torch.randint(3, 63, (2, 8), generator=generator)
        network(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def kept(optimizer, network, beta2, eps=1e-8):
    """sqrt(v / (1 - beta2^step)) + eps, by the parameter itself."""
    found = {}
    for name, parameter in network.named_parameters():
        state = optimizer.state[parameter]
        unbiased = state["exp_avg_sq"].double() / (1 - beta2 ** float(state["step"]))
        found[name] = unbiased.sqrt() + eps
    return found


@pytest.fixture
def trained(tmp_path, model):
    """A checkpoint of the Hugging Face Trainer, and the optimizer that it is of."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = [{"input_ids": [3 + i, 4, 5, 6], "labels": [3 + i, 4, 5, 6]} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        adam_beta2=0.95,
        weight_decay=0.1,
        save_steps=4,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(network, arguments, train_dataset=rows)
    trainer.train()
    inner = trainer.optimizer.optimizer
    return tmp_path / "run" / "checkpoint-4", kept(inner, trainer.model, 0.95)


def test_the_trainers_optimizer_by_number(run, trained, model, merge):
    checkpoint, expected = trained
    arguments = ("--from-optimizer", checkpoint, "--model", checkpoint, "--quiet")
    result = run(*arguments, "--out", "adam")
    assert result.exit_code == 0, result.output
    found = load_file("adam/model.safetensors")
    assert found.keys() == expected.keys()
    for name, own in found.items():
        torch.testing.assert_close(own.double(), expected[name], rtol=1e-6, atol=0)
    models = [
        {"model": str(checkpoint), "parameters": {"metric": str(Path("adam").resolve())}},
        {"model": model, "parameters": {"metric": "identity"}},
    ]
    merge({"merge_method": "karcher", "models": models, "dtype": "float32"}).weights  # noqa: B018


def test_shapes_that_do_not_prove_the_mapping_are_refused(run, trained, tmp_path):
    checkpoint, _ = trained
    wider = llama(tmp_path / "wider", 0)
    config = json.loads((Path(wider) / "config.json").read_text())
    network = LlamaForCausalLM(LlamaConfig(**config | {"intermediate_size": 56}))
    network.save_pretrained(wider, max_shard_size="1GB")
    (Path(wider) / "model.safetensors.index.json").unlink()
    result = run("--from-optimizer", checkpoint, "--model", wider, "--out", "bad")
    assert "numbers its 23 and 7 parameters" in result.output
    assert "no way of naming them fits" in result.output
    deeper = LlamaForCausalLM(LlamaConfig(**config | {"num_hidden_layers": 4}))
    with pytest.raises(KarcherError, match="no way of naming them fits the 39"):
        adam_metric(checkpoint, deeper)


def test_groups_of_a_plain_optimizer_and_of_the_trainers_rules(tmp_path):
    """All in one group, or weights of norms decayed by the earlier rule and not by the present."""

    class Alike(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_norm = nn.Linear(2, 2, bias=False)
            self.output = nn.Linear(2, 2, bias=False)
            self.b_norm = nn.Linear(2, 2, bias=False)
            self.a_bias = nn.Parameter(torch.zeros(2, 2))

    network = Alike()
    state = {"exp_avg_sq": torch.ones(2, 2), "step": torch.tensor(1.0)}
    group = {"betas": (0.9, 0.99), "eps": 1e-8}
    saved = {
        "state": dict.fromkeys(range(4), state),
        "param_groups": [{**group, "params": [0, 1, 2, 3]}],
    }
    torch.save(saved, tmp_path / "optimizer.pt")
    assert set(adam_metric(tmp_path, network)) == {n for n, _ in network.named_parameters()}
    saved["param_groups"] = [{**group, "params": [0]}, {**group, "params": [1, 2, 3]}]
    torch.save(saved, tmp_path / "optimizer.pt")
    assert set(adam_metric(tmp_path, network)) == {n for n, _ in network.named_parameters()}
    saved["param_groups"] = [{**group, "params": [0, 1]}, {**group, "params": [2, 3]}]
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(KarcherError, match="no way of naming them fits"):
        adam_metric(tmp_path, network)


def test_an_optimizer_that_kept_names_needs_no_proof(model, tmp_path):
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    backwards = list(reversed(list(network.named_parameters())))
    optimizer = torch.optim.AdamW(backwards)
    train(optimizer, network)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = adam_metric(tmp_path, network)
    for name, expected in kept(optimizer, network, 0.999).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=0)


def test_two_ways_of_naming_that_fit_alike_are_refused(trained, monkeypatch, model):
    checkpoint, _ = trained
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    groupings = optimizer_module._groupings

    def ambiguous(network):
        first = next(groupings(network))
        yield first
        swap = {"k_proj": "v_proj", "v_proj": "k_proj"}  # of one shape
        yield [[re.sub("[kv]_proj", lambda m: swap[m[0]], name) for name in own] for own in first]

    monkeypatch.setattr(optimizer_module, "_groupings", ambiguous)
    with pytest.raises(KarcherError, match="more than one way of naming them fits"):
        adam_metric(checkpoint, network)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("inside", ["", "optimizer_0"])
def test_distributed_checkpoints_have_names(run, model, tmp_path, flat, inside):
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.98), eps=1e-7)
    train(optimizer, network)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(network, optimizer, options=options)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "run" / inside, no_dist=True)
    result = run(model, "--from-optimizer", "run", "--out", "adam", "--quiet")
    assert result.exit_code == 0, result.output
    found = load_file("adam/model.safetensors")
    for name, expected in kept(optimizer, network, 0.98, 1e-7).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=0)


def test_names_in_one_file_may_have_wrappers(model, tmp_path):
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for parameter in network.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(p for p in network.parameters() if p.requires_grad)
    train(optimizer, network)
    state = get_optimizer_state_dict(network, optimizer)
    for part in ("state", "param_groups"):
        assert part in state
    state["state"] = {f"module._orig_mod.{n}": entry for n, entry in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [f"module._orig_mod.{name}" for name in group["params"]]
    torch.save(state, tmp_path / "optimizer.bin")
    found = adam_metric(tmp_path, network)
    # What was frozen never moved: no weight there.
    assert not found["model.embed_tokens.weight"].any()
    name = "model.layers.0.mlp.up_proj.weight"
    own = optimizer.state[network.get_parameter(name)]
    expected = (own["exp_avg_sq"].double() / (1 - 0.999**3)).sqrt() + 1e-8
    torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=0)


def test_what_is_no_adam_is_refused(model, tmp_path):
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    train(optimizer, network)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(KarcherError, match="has momentum_buffer for 0, but no exp_avg_sq"):
        adam_metric(tmp_path, network)
    unused = torch.optim.AdamW(network.parameters())
    torch.save(unused.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(KarcherError, match="saved before the first step"):
        adam_metric(tmp_path, network)
    torch.save({"step": 1}, tmp_path / "optimizer.pt")
    with pytest.raises(KarcherError, match="is not the state of an optimizer"):
        adam_metric(tmp_path, network)
    (tmp_path / "optimizer.pt").write_bytes(b"no pickle")
    with pytest.raises(KarcherError, match="cannot be read"):
        adam_metric(tmp_path, network)
    empty = tmp_path / "empty"
    (empty / "global_step4").mkdir(parents=True)
    with pytest.raises(KarcherError, match=r"no optimizer state \(what DeepSpeed saves"):
        adam_metric(empty, network)
    state = get_optimizer_state_dict(network, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "sgd", no_dist=True)
    with pytest.raises(KarcherError, match="no exp_avg_sq of a named parameter"):
        adam_metric(tmp_path / "sgd", network)
    train(unused, network)
    dcp.save({"optimizer": unused.state_dict()}, checkpoint_id=tmp_path / "raw", no_dist=True)
    with pytest.raises(KarcherError, match="saved without names"):
        adam_metric(tmp_path / "raw", network)


def test_moments_without_a_past_and_of_an_old_format(model, tmp_path):
    squares = torch.tensor([4.0, 0.0])
    assert Moments(squares, 3, 0.0, 0.5).metric().tolist() == [2.5, 0.5]
    assert Moments(squares, 0, 0.9, 0.5).metric().tolist() == [2.5, 0.5]
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(network.parameters())
    train(optimizer, network)
    torch.save(
        optimizer.state_dict(), tmp_path / "optimizer.pt", _use_new_zipfile_serialization=False
    )
    name = "lm_head.weight"
    expected = kept(optimizer, network, 0.999)[name]
    torch.testing.assert_close(
        adam_metric(tmp_path, network)[name].double(), expected, rtol=1e-6, atol=0
    )
