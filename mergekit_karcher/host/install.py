"""Our method in the place of mergekit's: the only module that touches mergekit's registry.

No module of ours imports mergekit when it is itself imported: a program that imports ours first
would meet mergekit half-imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host import import_hooks

LOG = logging.getLogger(__name__)

OLDEST_MERGEKIT = (0, 1, 5)
FIRST_UNTESTED_MERGEKIT = (0, 2)

# Beside karcher, unless mergekit has a method of that name.
_FURTHER = ("karcher_mean", "fisher")

_methods: dict[str, Any] = {}


def register() -> None:
    """Put our method in place, whether mergekit was imported before or will be later.

    For programs that switch torch's autoload off, or that set MERGEKIT_KARCHER=0 and think better
    of it. Idempotent. Raises `KarcherError` if the installed mergekit does not fit.
    """
    import_hooks.watch()
    registry = importlib.import_module("mergekit.merge_methods.registry")
    method = registry.get("karcher")
    if isinstance(method, _Refusal):
        method.refuse()
    if method is not _method("karcher"):
        raise KarcherError(
            "karcher is still mergekit's own: import mergekit_karcher before another plugin that "
            "replaces it, and register it again."
        )


def take_over_karcher(module: Any) -> None:
    """Hand mergekit's registry, which imports this module next, our method as the built-in."""
    module.karcher_merge_method = _method("karcher")


def register_methods(registry: Any) -> None:
    """Make sure that `karcher` is ours in a registry that has run, and add our further methods."""
    table = getattr(registry, "_METHODS", None) or getattr(registry, "REGISTERED_MERGE_METHODS", {})
    table["karcher"] = _method("karcher")
    add = getattr(registry, "register", None)
    for name in _FURTHER:
        if table.get(name) is None:
            if add is not None and not isinstance(_method(name), _Refusal):
                add(_method(name))
            else:
                table[name] = _method(name)
    if hasattr(registry, "karcher_merge_method"):
        registry.karcher_merge_method = _method("karcher")
    builtin = sys.modules.get("mergekit.merge_methods.karcher")
    if builtin is not None:
        take_over_karcher(builtin)


def look_at_plans(module: ModuleType) -> None:
    """Have the plans of `mergekit-yaml` and `mergekit-multi` looked at before they run."""
    if not isinstance(_method("karcher"), _Refusal):
        from mergekit_karcher.host.checks import watch_planner

        watch_planner(module.MergePlanner)


def look_at_flat_plans(module: ModuleType) -> None:
    """Have the plans of `mergekit-pytorch` looked at before they run."""
    if not isinstance(_method("karcher"), _Refusal):
        from mergekit_karcher.host.checks import watch_flat_planner

        watch_flat_planner(module)


def look_again_at_commands(module: Any) -> None:
    """Have each of mergekit's commands look again once its options are read."""
    apply = module.MergeOptions.apply_global_options
    if hasattr(apply, "__wrapped__"):
        return

    @functools.wraps(apply)
    def apply_global_options(self: Any) -> Any:
        import_hooks.watch()
        return apply(self)

    module.MergeOptions.apply_global_options = apply_global_options


def look_again(_module: ModuleType) -> None:
    """Run the hooks of modules that were incomplete before."""
    import_hooks.watch()


def _method(name: str) -> Any:
    if name not in _methods:
        _methods[name] = _build(name)
    return _methods[name]


def _build(name: str) -> Any:
    try:
        version = importlib.metadata.version("mergekit")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    reason = "it was written for mergekit >= 0.1.5, < 0.2"
    if OLDEST_MERGEKIT <= numbers < FIRST_UNTESTED_MERGEKIT:
        try:
            if name == "fisher":
                from mergekit_karcher.host.fisher_method import build_fisher

                return build_fisher()
            from mergekit_karcher.host.methods import build_method

            return build_method(name)
        except Exception as error:
            LOG.debug("mergekit-karcher could not build its method", exc_info=True)
            reason = f"{type(error).__name__}: {error}"
    return _Refusal(
        name,
        f"merge_method: {name} cannot run: mergekit-karcher {__version__} does not fit mergekit "
        f"{version} ({reason}); install a mergekit that fits, or set MERGEKIT_KARCHER=0 for "
        "mergekit's own karcher.",
    )


class _Refusal:
    """Stands for our method where it cannot be built: whatever a planner asks of it is refused.

    Silence would hand the user the built-in under our name.
    """

    def __init__(self, name: str, sentence: str) -> None:
        self.spec = SimpleNamespace(name=name, pretty_name=name, reference_url=None)
        self._sentence = sentence

    def refuse(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise KarcherError(self._sentence)

    __call__ = refuse

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return self.refuse
