"""Fresh interpreters, as users start them."""

from __future__ import annotations

import os
import subprocess
import sys


def run(code, *options, **environment):
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "could not take its place" not in done.stderr
    return done.stdout.strip()
