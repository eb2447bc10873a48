"""The one error type that a user's configuration or input can cause."""

from __future__ import annotations

import click


class KarcherError(click.ClickException, RuntimeError):
    """One sentence: which model, which tensor, what was seen, what to do.

    mergekit's commands print it without a traceback and exit with status 1; Python callers catch
    it as a `RuntimeError`. It is no `ValueError`, which pydantic would wrap inside a task.
    """
