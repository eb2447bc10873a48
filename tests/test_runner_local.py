"""Processes that do units."""

from __future__ import annotations

import os
import signal
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest

from mergekit_karcher.runner import local


def test_a_process_that_is_ended_at_its_birth_does_not_handle_that_as_its_parent_does(
    monkeypatch, tmp_path
):
    """Ctrl-C and kill go to all processes of a group, also to one that has only just begun."""
    prepare = local._prepare

    def ended_first(number):
        os.kill(os.getpid(), signal.SIGTERM)
        prepare(number)

    def handle(*_):
        (tmp_path / "handled").touch()

    monkeypatch.setattr(local, "_prepare", ended_first)
    before = signal.signal(signal.SIGTERM, handle)
    options = SimpleNamespace(device="cpu")
    workers = local.LocalWorkers(
        SimpleNamespace(recipe=SimpleNamespace(options=options)), 1, own_gpus=False
    )
    try:
        with pytest.raises(BrokenProcessPool):
            workers.submit("a unit", None).result(60)
        assert not (tmp_path / "handled").exists()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (tmp_path / "handled").exists()  # by this process, which takes the signal as before
    finally:
        workers.stop()
        signal.signal(signal.SIGTERM, before)
