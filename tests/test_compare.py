"""Which merge is best: judged as a slow reference judges, chosen on other windows than reported."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import assert_error, llama
from peft import LoraConfig, get_peft_model
from processes import end_of, fork
from safetensors.torch import load_file, save_file
from small_models import WORDS, records
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from mergekit_karcher.cli.main import main
from mergekit_karcher.compare import bench, judge
from mergekit_karcher.compare.candidates import default_candidates
from mergekit_karcher.compare.judge import CHOOSING, REPORTING, Judge
from mergekit_karcher.compare.noise import mean_difference, paired_difference
from mergekit_karcher.compare.result import Entry, Tuned, choose, read, score
from mergekit_karcher.compare.texts import read_texts
from mergekit_karcher.metrics.examples import Source

LENGTH = 16
SOURCE = Source("", None, "train", ("text",), "label", LENGTH, 0, 0)
FEW = ("--windows", 3, "--length", LENGTH, "--quiet")


@pytest.fixture(autouse=True)
def one_thread():
    """What is forked from a process that has used OpenMP must keep to one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts, by their names."""
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("first", "second")):
        words = np.random.default_rng(seed).integers(60, size=1600)
        (folder / f"{name}.txt").write_text(" ".join(f"w{word}" for word in words))
    return {name: folder / f"{name}.txt" for name in ("first", "second")}


def arguments(what, texts, out, *options):
    data = [part for name, place in texts.items() for part in ("--data", f"{name}={place}")]
    return [str(part) for part in ("compare", *what, *data, "--out", out, *FEW, *options)]


@pytest.fixture
def compare(cli, close_models, texts, tmp_path):
    """Compare the three fine-tunes of a base on both texts, by default."""

    def run(*options, what=("--base", *close_models), data=texts):
        return cli(*arguments(what, data, tmp_path / "out", *options))

    return run


@pytest.fixture(scope="module")
def default(close_models, texts, tmp_path_factory):
    """The folder of a comparison of the default merges."""
    out = tmp_path_factory.mktemp("default")
    result = CliRunner().invoke(main, arguments(["--base", *close_models], texts, out))
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def configs(close_models, tmp_path):
    """Three configs of the fine-tunes, of which the last one cannot be merged."""
    copies = [str(shutil.copytree(m, tmp_path / Path(m).name)) for m in close_models]
    models = [{"model": model, "parameters": {"weight": 1}} for model in copies[1:]]
    methods = {
        "mine": {"merge_method": "task_arithmetic", "base_model": copies[0]},
        "average": {"merge_method": "linear"},
        "broken": {"merge_method": "karcher", "parameters": {"granularity": "cell"}},
    }
    paths = []
    for name, method in methods.items():
        paths.append(tmp_path / f"{name}.yml")
        paths[-1].write_text(yaml.safe_dump({**method, "models": models, "dtype": "float32"}))
    return paths


def windows_of(texts, model, count=3):
    tokenizer = AutoTokenizer.from_pretrained(model)
    places = {name: str(place) for name, place in texts.items()}
    return read_texts(places, SOURCE, count, tokenizer, None, quiet=True)


@torch.inference_mode()
def slow_bits(model, ids):
    """The bits of each token but the first, each from a forward pass over those before it."""
    bits = 0.0
    for place in range(1, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double()
        bits -= math.log2(torch.softmax(logits, -1)[ids[place]])
    return bits


def test_bits_per_byte_are_those_of_a_slow_reference(close_models, texts, default):
    (entry,) = [entry for entry in read(default).models if entry.name == "tune1"]
    model = AutoModelForCausalLM.from_pretrained(close_models[1], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(close_models[1])
    for text in windows_of(texts, close_models[1]):
        bits = [slow_bits(model, example.ids) for example in text.reporting.examples]
        sizes = [
            len(tokenizer.decode(example.ids[1:]).encode()) for example in text.reporting.examples
        ]
        assert entry.reporting.costs[text.name] == pytest.approx(bits, rel=1e-5)
        assert entry.reporting.rates[text.name] == pytest.approx(sum(bits) / sum(sizes), rel=1e-5)
    rates = list(entry.reporting.rates.values())
    assert entry.reporting.mean == pytest.approx(np.mean(rates))
    assert entry.reporting.worst == max(rates)


def test_the_batch_changes_nothing(close_models, texts, monkeypatch):
    windows = windows_of(texts, close_models[0], count=5)
    alike = Judge(windows, classifies=False).judge(close_models[0], (CHOOSING,))
    monkeypatch.setattr(judge, "_TOKENS", 1)
    single = Judge(windows, classifies=False).judge(close_models[0], (CHOOSING,))
    for name, costs in single[CHOOSING].items():
        assert alike[CHOOSING][name] == pytest.approx(costs, rel=1e-6)


def test_paired_differences_have_the_plain_standard_error():
    generator = np.random.default_rng(0)
    costs, others = generator.normal(size=(2, 12))
    found = paired_difference(costs, others, np.full(12, 4))
    assert found.value == pytest.approx(np.mean((costs - others) / 4))
    plain = np.std((costs - others) / 4, ddof=1) / np.sqrt(12)
    assert found.error == pytest.approx(plain)
    both = mean_difference([found, paired_difference(others, costs, np.full(12, 4))])
    assert both == pytest.approx((0, plain / np.sqrt(2)))


def test_the_error_of_windows_of_different_sizes_is_that_of_a_bootstrap():
    generator = np.random.default_rng(1)
    sizes = generator.integers(20, 200, size=300)
    costs = 2.0 * sizes + generator.normal(size=300) * sizes
    others = costs - 0.1 * sizes + generator.normal(size=300) * np.sqrt(sizes)
    drawn = generator.integers(300, size=(4000, 300))
    rates = (costs - others)[drawn].sum(1) / sizes[drawn].sum(1)
    assert paired_difference(costs, others, sizes).error == pytest.approx(rates.std(), rel=0.05)


@pytest.mark.parametrize("repeats", [1, 4])
def test_no_window_has_two_purposes(repeats, close_models, texts, tmp_path):
    longer = {name: tmp_path / name for name in texts}
    for name, place in longer.items():
        place.write_text(" ".join([texts[name].read_text()] * repeats))
    for text in windows_of(longer, close_models[0], count=8):
        choosing, reporting = (
            [tuple(e.ids) for e in part.examples] for part in (text.choosing, text.reporting)
        )
        spare = [tuple(example.ids) for example in text.spare]
        assert len(choosing) == len(reporting) == 8
        assert len(spare) > 50
        everything = [*choosing, *reporting, *spare]
        assert len(set(everything)) == len(everything)


def test_a_short_text_is_divided_evenly(close_models, tmp_path):
    place = tmp_path / "short.txt"
    place.write_text(" ".join(f"w{index % 60}" for index in range(5 * LENGTH)))
    (text,) = windows_of({"short": place}, close_models[0], count=8)
    assert [len(text.choosing.examples), len(text.reporting.examples)] == [2, 2]


def entry(name, costs, simplicity, tuned=()):
    costs = {"text": costs}
    scored = score(costs, {"text": [1] * 4}, None)
    return Entry(
        name=name,
        kind="merge",
        simplicity=simplicity,
        tuned=tuned,
        choosing=scored,
        reporting=scored,
    )


def test_a_tie_goes_to_the_simplest():
    number = Tuned(name="lambda", value=0.5, before=0.7, evaluations=9)
    linear = entry("linear", [1.0, 2.0, 3.0, 4.0], 0)
    noise = entry("noise", [1.3, 1.69, 3.3, 3.69], 1)
    tuned = entry("tuned", [1.3, 1.69, 3.3, 3.68], 0, [number])
    clear = entry("clear", [0.9, 1.8, 2.9, 3.8], 2)
    sizes = {"text": [1] * 4}
    assert [one.name for one in choose([linear, noise, tuned], sizes)] == ["tuned", "linear"]
    assert [one.name for one in choose([tuned, noise], sizes)] == ["tuned", "noise"]
    assert [one.name for one in choose([linear, noise, clear], sizes)] == ["clear", "clear"]


def test_the_default_merges_and_what_is_written(default):
    comparison = read(default)
    assert comparison.reference == "linear"
    assert {entry.name for entry in comparison.merges} == {
        *("linear", "karcher", "task_arithmetic", "ties", "fisher, self", "fisher, input Grams"),
        *("karcher, base", "karcher, row, base", "karcher, row, base, linear length"),
    }
    assert [(entry.name, entry.kind) for entry in comparison.models] == [
        ("base", "base"),
        *((f"tune{number}", "model") for number in (1, 2, 3)),
    ]
    assert sorted(path.name for path in default.iterdir()) == [
        *(".compare", "best.yml", "compare.html", "compare.json", "compare.md", "compare.png"),
        "grams",
    ]
    assert not list((default / ".compare").rglob("*.safetensors"))
    for name in ("compare.json", "compare.md"):
        assert str(default.parent) not in (default / name).read_text()


def test_the_chosen_config_merges_to_the_model_that_was_judged(default, texts, close_models, merge):
    comparison, best = read(default), (default / "best.yml").read_text()
    assert f"# Take {comparison.chosen}" in best
    merged = merge(yaml.safe_load(best))
    costs = Judge(windows_of(texts, close_models[0]), classifies=False).judge(
        merged.out, (REPORTING,)
    )
    chosen = comparison.entry(comparison.chosen).reporting.costs
    for name, values in costs[REPORTING].items():
        assert chosen[name] == pytest.approx(values, rel=1e-5)


def test_two_models_have_slerp(close_models):
    of_two, of_three = (
        {one.name for one in default_candidates("base", ["a", "b", "c"][:n], "bfloat16", {})}
        for n in (2, 3)
    )
    assert of_two - of_three == {"slerp"}


def judged(monkeypatch):
    """The folders that are judged from now on, and for what."""
    calls = []
    judging = Judge.judge

    def count(self, reference, purposes):
        calls.append((Path(reference).name, tuple(purposes)))
        return judging(self, reference, purposes)

    monkeypatch.setattr(Judge, "judge", count)
    return calls


def test_a_run_that_is_killed_goes_on(compare, configs, texts, tmp_path, monkeypatch):
    def die_in_the_sixth():
        judging, calls = Judge.judge, []

        def judge_or_die(self, reference, purposes):
            calls.append(reference)
            if len(calls) == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return judging(self, reference, purposes)

        Judge.judge = judge_or_die

    assert compare(what=configs).exit_code == 0
    whole = read(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    log = tmp_path / "log"
    process = fork(arguments(configs, texts, tmp_path / "out"), log, die_in_the_sixth)
    assert end_of(process) == -signal.SIGKILL, log.read_text()
    calls = judged(monkeypatch)
    assert compare(what=configs).exit_code == 0
    assert len(calls) == len(whole.entries) - 5 == 1
    assert read(tmp_path / "out") == whole
    assert not list((tmp_path / "out" / ".compare").rglob("*.safetensors"))


def test_only_what_has_changed_is_measured_again(compare, configs, tmp_path, monkeypatch):
    assert compare(what=configs).exit_code == 0
    before = read(tmp_path / "out")
    calls = judged(monkeypatch)
    assert compare(what=configs).exit_code == 0
    assert (calls, read(tmp_path / "out")) == ([], before)
    other = llama(tmp_path / "other", 7, dtype=torch.float32)
    shutil.copytree(other, tmp_path / "tune3", dirs_exist_ok=True)
    assert compare(what=configs).exit_code == 0
    assert [name for name, _ in calls if name.startswith(("base", "tune"))] == ["tune3"]
    assert len(calls) == 1 + len(before.merges)


def test_a_model_that_changes_meanwhile_is_noticed(compare, configs, tmp_path, monkeypatch):
    judging = Judge.judge

    def spoil(self, reference, purposes):
        if Path(reference).name == "tune1":
            os.utime(next(Path(reference).glob("*.safetensors")), ns=(0, 0))
        return judging(self, reference, purposes)

    monkeypatch.setattr(Judge, "judge", spoil)
    assert_error(compare(what=configs), "tune1", "has changed while it was compared")


def test_configs_are_compared_with_the_linear_one(compare, configs, tmp_path):
    result = compare(what=configs)
    assert result.exit_code == 0, result.output
    comparison = read(tmp_path / "out")
    assert comparison.reference == "average"
    assert {entry.name for entry in comparison.merges} == {"average", "mine"}
    (left_out,) = comparison.left_out
    assert left_out.name == "broken"
    assert "granularity" in left_out.why
    assert str(tmp_path) not in (tmp_path / "out" / "compare.json").read_text()
    mine, average = comparison.entry("mine").reporting, comparison.entry("average").reporting
    assert mine.difference == pytest.approx(mine.mean - average.mean)
    assert average.error == 0


def test_a_budget_leaves_merges_out_and_says_so(compare, tmp_path):
    assert compare("--budget", 1e-9).exit_code == 0
    comparison = read(tmp_path / "out")
    assert [entry.name for entry in comparison.merges] == ["linear"]
    assert len(comparison.left_out) == 8
    said = "minutes of --budget were over): fisher, self; task_arithmetic; "
    assert said in (tmp_path / "out" / "compare.md").read_text()
    assert "--budget" in comparison.left_out[0].why


def test_what_is_tuned_is_searched_for_on_the_windows_to_choose_by(
    compare, configs, tmp_path, monkeypatch
):
    monkeypatch.setattr("mergekit_karcher.compare.tune.TRIES", 3)
    calls = judged(monkeypatch)
    what = configs[:2]
    result = compare("--tune-kinds", what=what)
    assert result.exit_code == 0, result.output
    comparison = read(tmp_path / "out")
    tuned = [entry for entry in comparison.merges if entry.tuned]
    both, choosing = (CHOOSING, REPORTING), (CHOOSING,)
    assert [purposes for _, purposes in calls].count(both) == 4 + 2 + len(tuned)
    assert [purposes for _, purposes in calls].count(choosing) > 3
    assert tuned
    for entry in tuned:
        for number in entry.tuned:
            line = f"{number.name} from {number.before:g} to {number.value:g}"
            assert line in (tmp_path / "out" / "best.yml").read_text()
    untuned = comparison.entry("mine").choosing.mean
    assert comparison.entry("mine, tuned").choosing.mean < untuned
    calls.clear()
    assert compare("--tune-kinds", what=what).exit_code == 0
    assert calls == []


def test_classifiers_are_judged_by_their_errors(cli, classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2):
        shutil.copytree(classifier, f"tune{number}")
        network = AutoModelForSequenceClassification.from_pretrained(classifier)
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        network.save_pretrained(f"tune{number}")
    rows = [{"text": f"w{i} w{i * 7 % 60}", "label": i % 3} for i in range(30)]
    records("rows.jsonl", rows)
    models = ["--base", classifier, "tune1", "tune2", "--data", "rows.jsonl"]
    result = cli("compare", *models, "--windows", 15, "--budget", 1e-9)
    assert result.exit_code == 0, result.output
    assert "Errors in per cent" in result.output
    comparison = read(Path("comparison"))
    assert comparison.measure == "errors"
    (entry,) = [entry for entry in comparison.models if entry.name == "tune1"]
    network = AutoModelForSequenceClassification.from_pretrained("tune1")
    tokenizer = AutoTokenizer.from_pretrained("tune1")
    wrong = 0
    for row in rows:
        logits = network(**tokenizer(row["text"], return_tensors="pt")).logits
        wrong += int(logits.argmax() != row["label"])
    costs = [*entry.choosing.costs["rows"], *entry.reporting.costs["rows"]]
    assert (len(costs), sum(costs)) == (30, wrong)


def short(folder):
    (folder / "short.txt").write_text("w1 w2 w3")
    return {"short": folder / "short.txt"}


def empty(folder):
    (folder / "empty.txt").write_text("")
    return {"empty": folder / "empty.txt"}


def foreign(folder):
    (folder / "foreign.txt").write_text("pas un mot de ces langues " * 80)
    return {"foreign": folder / "foreign.txt"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda _: {}, ["There is no text to judge by", "--data"]),
        (empty, ["empty.txt holds no example"]),
        (short, ["short", "is too short", "give more text"]),
        (foreign, ["100 %", "unknown to the tokenizer"]),
        (lambda folder: {"gone": folder / "gone.txt"}, ["There is no file", "gone.txt"]),
        (lambda folder: {"": folder}, ["lacks a name"]),
    ],
)
def test_texts_that_say_nothing_are_refused(data, words, compare, tmp_path):
    assert_error(compare(data=data(tmp_path)), *words)


def test_models_that_cannot_be_compared_are_refused(compare, close_models, configs, tmp_path):
    base, *models = close_models
    assert_error(compare(what=models), "Say by --base")
    assert_error(compare(what=["--base", base, base, models[0]]), "Give two models or more")
    other = shutil.copytree(models[0], tmp_path / "other")
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    path.write_text(json.dumps(tokenizer))
    result = compare(what=["--base", base, models[1], other])
    assert_error(result, "other", "different tokenizers")
    assert_error(compare(what=["--base", base, models[0], tmp_path / "x"]), "There is no model at")
    mixed = compare(what=["--base", base, *configs])
    assert (mixed.exit_code, "Give configs alone" in mixed.output) == (2, True)


def test_a_merge_that_breaks_the_model_is_left_out(compare, configs, tmp_path, monkeypatch):
    merging = bench.merge

    def break_mine(source, folder, *settings):
        merging(source, folder, *settings)
        if "task_arithmetic" in source:
            tensors = load_file(folder / "model.safetensors")
            tensors["model.norm.weight"].fill_(math.nan)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(bench, "merge", break_mine)
    assert compare(what=configs[:2]).exit_code == 0
    (left_out,) = read(tmp_path / "out").left_out
    assert left_out.name == "mine"
    assert left_out.why.startswith("The merge gives NaN or infinity on ")


def test_without_enough_text_for_grams_the_rest_is_compared(compare, tmp_path):
    place = tmp_path / "few.txt"
    place.write_text(WORDS)
    assert compare("--budget", 1e-9, data={"few": place}).exit_code == 0
    left_out, *_ = read(tmp_path / "out").left_out
    assert left_out.name == "fisher, input Grams"
    assert "are left" in left_out.why


def test_a_base_with_an_adapter_is_judged_as_their_sum(compare, close_models, texts, tmp_path):
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(close_models[0], dtype=torch.float32)
    settings = LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
    adapted = get_peft_model(network, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "sum")
    what = ["--base", close_models[0], f"{close_models[0]}+{tmp_path / 'adapter'}", close_models[1]]
    lora = ("--lora-merge-cache", tmp_path / "cache", "--lora-merge-dtype", "float32")
    result = compare("--budget", 1e-9, *lora, what=what)
    assert result.exit_code == 0, result.output
    (entry,) = [entry for entry in read(tmp_path / "out").models if "adapter" in entry.name]
    windows = windows_of(texts, close_models[0])
    costs = Judge(windows, classifies=False).judge(tmp_path / "sum", (REPORTING,))
    for name, values in costs[REPORTING].items():
        assert entry.reporting.costs[name] == pytest.approx(values, rel=1e-5)
