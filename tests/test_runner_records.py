"""What is kept of a unit that is done."""

from __future__ import annotations

import errno
from contextlib import nullcontext
from pathlib import Path

import pytest

from mergekit_karcher.runner import records


def test_a_full_disk_is_an_error_of_the_system(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "replacing", lambda _: nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match="No space left") as raised:
        records.store(records.Record(None, None), tmp_path / "record")
    assert raised.value.errno == errno.ENOSPC
