"""A run from data can be interrupted, goes on where it was, and is never taken for a metric."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file
from small_models import TEXT
from torch import nn
from transformers import AutoModelForCausalLM

from mergekit_karcher import files
from mergekit_karcher.metrics import accumulate
from mergekit_karcher.metrics.diagonal import DiagonalFisher
from mergekit_karcher.metrics.model import fingerprint


def test_an_interrupted_run_goes_on_where_it_was(run_fisher, text_model, tmp_path, monkeypatch):
    for options in ((), ("--true",)):
        whole, part = f"whole{len(options)}", f"part{len(options)}"
        run_fisher(text_model, *TEXT, *options, "--out", whole)
        calls = []
        add = DiagonalFisher.add

        def failing(self, batch, sampler=None, add=add, calls=calls):
            calls.append(len(batch.ids))
            if len(calls) == 4:
                raise KeyboardInterrupt
            add(self, batch, sampler)

        with monkeypatch.context() as patch:
            patch.setattr(accumulate, "_SECONDS_BETWEEN_SAVES", -1)
            patch.setattr(DiagonalFisher, "add", failing)
            assert run_fisher(text_model, *TEXT, *options, "--out", part).exit_code == 1
            assert [path.name for path in Path(part).iterdir()] == ["partial.safetensors"]
            refused = run_fisher(text_model, *TEXT, *options, "--out", part, "--seed", 5)
            assert "is of a run with other seed: name" in refused.output
            assert run_fisher(text_model, *TEXT, *options, "--out", part).exit_code == 0
        assert sum(calls) == 25 + calls[3]
        metrics = [load_file(Path(name, "model.safetensors")) for name in (whole, part)]
        assert all(torch.equal(metrics[0][name], metrics[1][name]) for name in metrics[0])
        assert {path.name for path in Path(part).iterdir()} == {"model.safetensors", "metric.json"}
        assert f"{part} exists" in run_fisher(text_model, *TEXT, *options, "--out", part).output


def test_a_signal_to_stop_is_heeded_at_the_end_of_a_batch(run_fisher, text_model, monkeypatch):
    run_fisher(text_model, *TEXT, "--out", "whole")
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
        result = run_fisher(text_model, *TEXT, "--out", "part")
        assert "Stopped after 5 of 25 examples, which are kept in part" in result.output
        assert signal.getsignal(signal.SIGINT) is before
        # The size of a batch may be another when it goes on.
        assert run_fisher(text_model, *TEXT, "--batch-size", 7, "--out", "part").exit_code == 0
    assert calls == [1] * 5 + [7, 7, 6]
    metrics = [load_file(Path(name, "model.safetensors")) for name in ("whole", "part")]
    for name, tensor in metrics[0].items():
        torch.testing.assert_close(metrics[1][name], tensor, rtol=1e-4, atol=1e-12)


def test_what_is_cut_off_while_it_is_written_is_no_metric(run_fisher, text_model, monkeypatch):
    """metric.json comes last, and the sums stay until it is there."""
    written = []
    rename = os.replace

    def failing(source, target):
        written.append(Path(target).name)
        if written[-1] == "metric.json":
            raise OSError("the disk is full")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", failing)
        assert "the disk is full" in run_fisher(text_model, *TEXT, "--out", "part").output
    assert written == ["partial.safetensors", "model.safetensors", "metric.json"]
    left = {path.name for path in Path("part").iterdir()}
    assert left == {"partial.safetensors", "model.safetensors"}
    assert run_fisher(text_model, *TEXT, "--out", "part").exit_code == 0
    assert {path.name for path in Path("part").iterdir()} == {"model.safetensors", "metric.json"}


def test_a_run_that_is_cut_off_before_its_first_save_leaves_nothing(
    run_fisher, text_model, monkeypatch
):
    def stopping(self, batch, sampler=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DiagonalFisher, "add", stopping)
        assert run_fisher(text_model, *TEXT, "--out", "early").exit_code == 1
    assert not Path("early").exists()
    assert run_fisher(text_model, *TEXT, "--out", "early").exit_code == 0


def test_what_is_unfinished_is_kept_from_others_and_may_be_deleted(
    run_fisher, text_model, tmp_path
):
    out = tmp_path / "part"
    out.mkdir()
    (out / "partial.safetensors").write_bytes(b"")
    result = run_fisher(text_model, "--from-optimizer", text_model, "--out", "part")
    assert "holds an unfinished run from data" in result.output
    (out / "partial.safetensors").unlink()
    (out / "model.safetensors").write_bytes(b"of somebody else")
    assert "part exists: name a new folder" in run_fisher(text_model, *TEXT, "--out", "part").output
    (out / "model.safetensors").unlink()
    (out / "partial.safetensors.partial").write_bytes(b"cut off")
    refused = run_fisher(text_model, "--from-optimizer", text_model, "--out", "part")
    assert "part exists: name a new folder" in refused.output
    assert run_fisher(text_model, *TEXT, "--out", "part").exit_code == 0
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "metric.json"}


def test_weights_are_told_apart_by_their_bits():
    torch.manual_seed(1)
    network, before = nn.Linear(999, 999), torch.get_num_threads()
    prints = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        prints.add(fingerprint(network))
    torch.set_num_threads(before)
    assert len(prints) == 1
    with torch.no_grad():
        network.bias[5] = torch.nextafter(network.bias[5], torch.tensor(9.0))
    assert fingerprint(network) not in prints


def test_gradients_that_are_not_finite_stop_the_run(run_fisher, text_model, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    with torch.no_grad():
        broken.model.embed_tokens.weight[5] = torch.inf
    shutil.copytree(text_model, tmp_path / "broken")
    broken.save_pretrained(tmp_path / "broken", max_shard_size="20KB")
    result = run_fisher("broken", *TEXT, "--out", "metric")
    assert "The gradients of" in result.output
    assert "are not finite after" in result.output
    assert not Path("metric").exists()
