"""Examples for the Fisher information: texts, records and datasets, and mistakes about them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file
from small_models import TEXT, by_a_plain_loop, records
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from mergekit_karcher.metrics.diagonal import Batch
from mergekit_karcher.metrics.examples import Example, Source, batches, read_examples


def test_batches_have_one_length_each_and_lose_nothing():
    all_examples = [Example([1] * length, length) for length in (2, 2, 2, 3, 5, 5)]
    made = list(batches(all_examples, 2))
    assert [tuple(batch.ids.shape) for batch in made] == [(2, 2), (1, 2), (1, 3), (2, 5)]
    assert [label for batch in made for label in batch.labels.tolist()] == [2, 2, 2, 3, 5, 5]


def test_examples_come_the_shortest_first(text_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": " ".join(["w1"] * count)} for count in (5, 2, 4, 2, 3)]
    records("lengths.jsonl", [*rows, {"text": None}])
    source = Source("lengths.jsonl", None, "train", ["text"], "label", 4, 100, 0)
    examples = read_examples(source, PreTrainedTokenizerFast.from_pretrained(text_model), None)
    assert [len(example.ids) for example in examples] == [2, 2, 3, 4, 4]


def test_true_targets_are_drawn_anew_for_every_example(run_fisher, text_model):
    Path("same.txt").write_text(" ".join(["w1 w2 w3 w4"] * 20))
    options = ("--data", "same.txt", "--length", 4, "--true", "--quiet")
    for count in (1, 20):
        assert (
            run_fisher(text_model, *options, "--examples", count, "--out", f"true{count}").exit_code
            == 0
        )
    one, many = (load_file(f"true{count}/model.safetensors") for count in (1, 20))
    name = "lm_head.weight"
    assert (one[name] - many[name]).norm() > 0.1 * one[name].norm()


def test_a_classifier_from_records(run_fisher, classifier, tmp_path):
    rows = [
        {"first": "w1 w2 w3", "second": "w4", "class": "yes"},
        {"first": "w5 w6", "second": "w7 w8", "class": "no"},
        {"first": "w5", "second": "w9", "class": "maybe"},
    ]
    records("pairs.jsonl", rows)
    options = ("--text", "first", "--text", "second", "--label", "class", "--quiet")
    result = run_fisher(classifier, "--data", "pairs.jsonl", *options, "--out", "metric")
    assert result.exit_code == 0, result.output
    metric = load_file(tmp_path / "metric" / "model.safetensors")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / classifier)
    network = BertForSequenceClassification.from_pretrained(tmp_path / classifier).eval()
    expected = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for row in rows:
        ids = torch.tensor([tokenizer(row["first"], row["second"]).input_ids])
        label = torch.tensor([network.config.label2id[row["class"]]])
        for name, squares in by_a_plain_loop(network, Batch(ids, label)).items():
            expected[name] += squares / 3
    assert metric.keys() == expected.keys()
    for name, tensor in metric.items():
        assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm()


def test_classes_are_matched_by_name_where_a_dataset_numbers_them_otherwise(
    run_fisher, classifier, tmp_path
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
    assert run_fisher(classifier, "--data", "named.jsonl", "--quiet", "--out", "a").exit_code == 0
    assert run_fisher(classifier, "--data", "other", "--quiet", "--out", "b").exit_code == 0
    metrics = [load_file(Path(name, "model.safetensors")) for name in "ab"]
    assert all(torch.equal(metrics[0][name], metrics[1][name]) for name in metrics[0])
    result = run_fisher(classifier, "--data", "own", "--quiet", "--out", "c")
    assert "has the classes 0, 1, 2 (label), but the model no, maybe, yes" in result.output
    # A model whose classes have no names takes numbers as they are.
    config = json.loads((tmp_path / classifier / "config.json").read_text())
    unnamed = {str(index): f"LABEL_{index}" for index in range(3)}
    changed = {**config, "id2label": unnamed, "label2id": {v: int(k) for k, v in unnamed.items()}}
    (tmp_path / classifier / "config.json").write_text(json.dumps(changed))
    assert run_fisher(classifier, "--data", "own", "--quiet", "--out", "c").exit_code == 0
    metrics.append(load_file("c/model.safetensors"))
    assert all(torch.equal(metrics[0][name], metrics[2][name]) for name in metrics[0])


def test_conversations_go_through_the_chat_template(run_fisher, text_model, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(text_model)
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(text_model)
    records("chat.jsonl", [{"messages": [{"role": "user", "content": "w2 w3"}]}])
    records("flat.jsonl", [{"text": "w1 w2 w3"}])
    chat = ("--data", "chat.jsonl", "--text", "messages", "--quiet", "--out", "chat")
    assert run_fisher(text_model, *chat).exit_code == 0
    assert run_fisher(text_model, "--data", "flat.jsonl", "--quiet", "--out", "flat").exit_code == 0
    metrics = [load_file(Path(name, "model.safetensors")) for name in ("chat", "flat")]
    assert all(torch.equal(metrics[0][name], metrics[1][name]) for name in metrics[1])


def test_mistakes_about_data(run_fisher, text_model, classifier):
    records("rows.jsonl", [{"text": "w1 w2", "label": 7, "note": None}])
    records("chat.jsonl", [{"text": [{"role": "user", "content": "w2 w3"}]}])
    Path("short.txt").write_text("w1")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("broken.jsonl").write_text('{"text": "w1 w2"}\n{"text')
    Path("empty.jsonl").write_text("")
    cases = {
        (text_model, "--data", "short.txt"): "holds no example: each needs at least two tokens",
        (
            text_model,
            "--data",
            "rows.jsonl",
            "--text",
            "txt",
        ): "no column txt, but text, label, note",
        (text_model, "--data", "rows.jsonl", "--text", "note"): "holds no example",
        (
            text_model,
            "--data",
            "rows.jsonl",
            "--text",
            "label",
        ): "label of rows.jsonl holds int, not",
        (text_model, "--data", "chat.jsonl"): "cannot be written as text",
        (text_model, "--data", "nowhere.jsonl"): "There is no file nowhere.jsonl",
        (text_model, "--data", "latin.txt"): "latin.txt is no text in UTF-8",
        (text_model, "--data", "broken.jsonl"): "broken.jsonl cannot be read",
        (text_model, "--data", "empty.jsonl"): "empty.jsonl cannot be read",
        (text_model, *TEXT, *("--text", "a") * 3): "Give one --text, or two",
        (classifier, "--data", "rows.jsonl"): "is of class 7 (label), but the model knows 3",
        (classifier, "--data", "text.txt"): "is a plain text, which has no classes",
        ("nowhere", "--data", "text.txt"): "nowhere is no model that transformers reads",
        (text_model,): "Give either --data or --from-optimizer",
        ("--data", "text.txt"): "Give one model, as the argument or by --model",
    }
    for arguments, words in cases.items():
        result = run_fisher(*arguments, "--out", "bad")
        assert (result.exit_code != 0, words in result.output) == (True, True), result.output
        assert "Traceback" not in result.output
        assert not Path("bad").exists()


def test_only_records_and_datasets_need_the_package_datasets(run_fisher, text_model, monkeypatch):
    records("rows.jsonl", [{"text": "w1 w2 w3"}])
    Path("folder").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)  # An import of it fails.
    for data in ("rows.jsonl", "folder", "org/dataset"):
        result = run_fisher(text_model, "--data", data, "--quiet", "--out", "refused")
        assert result.exit_code == 1
        assert result.output == (
            f"Error: Reading {data} needs the package datasets: pip install "
            "'mergekit-karcher[fisher]', or give a plain text.\n"
        )
    assert not Path("refused").exists()
    assert run_fisher(text_model, *TEXT, "--out", "metric").exit_code == 0
