"""The command `mergekit-karcher`, which imports each of its commands only when it is called."""

from __future__ import annotations

import difflib
import gc
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError, first_line

_LOG = logging.getLogger(__name__)

# Read by torch when it first allocates. Where Linux lets programs ask for large pages, tensors come
# in pages of 2 MB, and the many new pages of a merge cost a fraction of the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# The module of each command, and its line in the help text, which imports none of them.
_COMMANDS = {
    "align": ("mergekit_karcher.cli.align", "Reorder the neurons of models to be averaged."),
    "card": ("mergekit_karcher.cli.card", "Say in a model card how its merge was made."),
    "compare": (
        "mergekit_karcher.cli.compare",
        "Find out by which method models are merged best.",
    ),
    "doctor": (
        "mergekit_karcher.cli.doctor",
        "Say which karcher mergekit-yaml would run, and why.",
    ),
    "fisher": (
        "mergekit_karcher.cli.fisher",
        "Make a metric: how sure a model is of each parameter.",
    ),
    "merge": ("mergekit_karcher.cli.merge", "Merge large models: in parallel, and resumable."),
    "repair": ("mergekit_karcher.cli.repair", "Rescale the hidden units of a merged network."),
    "report": ("mergekit_karcher.cli.report", "Show the geometry of a config's models."),
    "suggest": ("mergekit_karcher.cli.suggest", "Write the config that suits some models."),
}

F = TypeVar("F", bound=Callable[..., Any])


class _Group(click.Group):
    """Imports commands by name, and turns every error of theirs into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        # Imports make no garbage, and looking for some takes a fifth of their time.
        gc.disable()
        try:
            command: click.Command = importlib.import_module(_COMMANDS[cmd_name][0]).main
        finally:
            gc.enable()
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in sorted(_COMMANDS.items())])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
        if args[0] not in _COMMANDS and near:
            ctx.fail(f"No such command {args[0]!r}: did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            # mergekit and transformers raise errors of many kinds and of many lines.
            _LOG.debug("stopped by", exc_info=True)
            raise KarcherError(
                f"{ctx.invoked_subcommand} met an error that it does not know "
                f"({type(error).__name__}: {first_line(error)}); -vv shows where."
            ) from None


@click.group(cls=_Group, epilog="`mergekit-karcher COMMAND --help` has examples.")
@click.version_option(__version__, prog_name="mergekit-karcher")
def main() -> None:
    """See the geometry of a merge, prepare its models, and finish its card.

    The merge itself is mergekit's: `merge_method: karcher` in the config of mergekit-yaml.
    """


def logged(function: F) -> F:
    """Add -v and --quiet to a command that does not have those of mergekit.

    Arguments:
        function: The callback of the command, under its other options; it gets `quiet`. -v is
            dealt with here.

    Returns:
        The callback, with the options.
    """
    function = click.option("--quiet", is_flag=True, help="Print nothing but errors.")(function)
    return click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_set_level,
        help="Log more; twice for tracebacks.",
    )(function)


def _set_level(_context: click.Context, _parameter: click.Parameter, value: int) -> None:
    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    logging.basicConfig(level=levels[min(value, len(levels) - 1)])


def examples(*lines: str) -> str:
    """Write the end of a help text.

    Arguments:
        lines: Commands, as they would be typed.

    Returns:
        An epilog whose lines click does not join.
    """
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])
