"""mergekit's own command-line options, for commands of ours that read models as its merges do."""

from __future__ import annotations

from typing import Any

import click
from mergekit.options import OPTION_CATEGORIES, MergeOptions, PrettyPrintHelp, add_merge_options

__all__ = [
    "MergeOptions",
    "PrettyPrintHelp",
    "ReadingCommand",
    "add_merge_options",
    "decisive",
]

# What does not matter where nothing is merged.
_CATEGORIES = ("Output Settings",)
_NAMES = ("async_write", "write_threads", "random_seed")

# Options of mergekit that say how a merge is done, and not what comes of it.
_NO_MATTER = {
    *("quiet", "verbosity", "num_threads", "async_write", "write_threads", "clone_tensors"),
    *("write_model_card", "copy_tokenizer"),
}


def decisive(options: MergeOptions) -> dict[str, Any]:
    """The options that decide what comes of a merge, as JSON can hold them."""
    values: dict[str, Any] = options.model_dump(mode="json", exclude=_NO_MATTER)
    return values


class ReadingCommand(PrettyPrintHelp):  # type: ignore[misc]
    """A command that takes all of mergekit's options, and hides those on the output of a merge."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for option in self.params:
            if isinstance(option, click.Option):
                category = OPTION_CATEGORIES.get(option.name or "")
                option.hidden = category in _CATEGORIES or option.name in _NAMES
