"""The one error type that a user's configuration or input can cause, and words of others."""

from __future__ import annotations

import pickle

import click


class KarcherError(click.ClickException, RuntimeError):
    """One sentence: which model, which tensor, what was seen, what to do.

    mergekit's commands print it without a traceback and exit with status 1; Python callers catch
    it as a `RuntimeError`. It is no `ValueError`, which pydantic would wrap inside a task.
    """


class NotFiniteError(KarcherError):
    """A value of an input is NaN or infinite."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, as far as it fits in a sentence."""
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
        # torch explains how to lift the restriction, which is not what to do.
        return "it holds more than tensors and numbers, and such a file could run any code"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
