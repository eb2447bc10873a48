"""One bar for a whole merge, or lines that a program can read."""

from __future__ import annotations

import json
import sys
import time

from tqdm import tqdm


class Progress:
    """How many of the output's bytes are merged.

    Arguments:
        total: Bytes of all units.
        title: What is merged.
        initial: Bytes that an earlier run has merged, which say nothing of the rate.
        as_json: Whether to write lines of JSON to standard error in the place of a bar.
        quiet: Whether to write nothing.
    """

    def __init__(self, total: int, title: str, initial: int, *, as_json: bool, quiet: bool) -> None:
        self._total, self._as_json, self._quiet = total, as_json, quiet
        self._begin = time.monotonic()
        self._initial = self._shown = initial
        self._bar = tqdm(
            total=total,
            desc=title,
            initial=initial,
            unit="B",
            unit_scale=True,
            disable=quiet or as_json,
            mininterval=0.2,
        )

    def show(self, done: int) -> None:
        """Show that so many bytes are done, those of earlier runs included."""
        done = max(self._shown, min(done, self._total))
        self._bar.update(done - self._shown)
        self._shown = done
        if self._as_json and not self._quiet:
            seconds = time.monotonic() - self._begin
            rate = (done - self._initial) / seconds if seconds else 0.0
            left = (self._total - done) / rate if rate else None
            line = {"bytes": done, "total": self._total, "bytes_per_second": rate}
            print(json.dumps(line | {"seconds_left": left}), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
