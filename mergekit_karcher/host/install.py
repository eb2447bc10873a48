"""Our methods in the place of mergekit's, and the refusal where they do not fit.

Nothing here imports mergekit when it is itself imported: a program that imports us first would meet
mergekit half-imported. The hooks below run when a module of mergekit is complete.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host import compat, import_hooks

_LOG = logging.getLogger(__name__)

# Every name that is ours, unless mergekit has a method of one of the last three.
_NAMES = ("karcher", "karcher_mean", "fisher", "regmean")

_methods: dict[str, Any] = {}


def register() -> None:
    """Put our methods in place, whether mergekit was imported before or will be later.

    For programs that switch torch's autoload off, or that set MERGEKIT_KARCHER=0 and think better
    of it. Idempotent.

    Raises:
        KarcherError: If the installed mergekit does not fit.
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


def replace_builtin(module: Any) -> None:
    """Hand mergekit's registry, which imports this module next, our method as the built-in."""
    module.karcher_merge_method = _method("karcher")


def register_methods(registry: Any) -> None:
    """Make sure that `karcher` is ours in a registry that has run, and add our other methods."""
    try:
        table = compat.table_of(registry)
    except KarcherError as error:
        _refuse_all(str(error))
        _refuse_by_name(registry)
        return
    for name in _NAMES:
        present = table.get(name)
        if name == "karcher" or present is None or _is_ours(present):
            table[name] = _method(name)
    if hasattr(registry, "karcher_merge_method"):
        registry.karcher_merge_method = _method("karcher")
    builtin = sys.modules.get("mergekit.merge_methods.karcher")
    if builtin is not None:
        replace_builtin(builtin)


def patch_config(module: Any) -> None:
    """Have the configs of `mergekit-yaml` and `mergekit-multi` checked as they are read."""
    _check_documents_of(module.MergeConfiguration)


def patch_planner(module: ModuleType) -> None:
    """Have the plans of `mergekit-yaml` and `mergekit-multi` rewritten."""
    _patch(module, lambda plan: plan.patch_planner(module.MergePlanner))


def patch_flat_planner(module: Any) -> None:
    """Have the plans of `mergekit-pytorch` rewritten."""
    _patch(module, lambda plan: plan.patch_flat_planner(module))
    _check_documents_of(module.RawPyTorchMergeConfig)


def patch_options(module: Any) -> None:
    """Have each of mergekit's commands look again once its options are read."""

    def watching(apply: Any) -> Any:
        def apply_global_options(self: Any) -> Any:
            import_hooks.watch()
            return apply(self)

        return apply_global_options

    compat.put_in_place_of(module.MergeOptions, "apply_global_options", watching)


def watch_again(_module: ModuleType) -> None:
    """Run the hooks of modules that were incomplete before."""
    import_hooks.watch()


def _patch(module: ModuleType, patch: Any) -> None:
    """Patch a planner, or refuse all merges of ours if it is not the one that we know."""
    if isinstance(_method("karcher"), _Refusal):
        return
    try:
        compat.check(module.__name__, "mergekit.io.tasks", "mergekit.merge_methods.task_adapter")
        patch(importlib.import_module("mergekit_karcher.host.plan"))
    except Exception as error:
        _LOG.debug("mergekit-karcher could not patch a planner", exc_info=True)
        _refuse_all(str(error) if isinstance(error, KarcherError) else repr(error))
        registry = importlib.import_module("mergekit.merge_methods.registry")
        register_methods(registry)


def _check_documents_of(kind: Any) -> None:
    """Have the configs of our methods that are read into one of mergekit's models checked."""

    def check(document: Any) -> None:
        name = document.get("merge_method") if isinstance(document, Mapping) else None
        if name in _NAMES and not isinstance(_method(name), _Refusal):
            checks = importlib.import_module("mergekit_karcher.host.config_checks")
            checks.check_keys(document, kind, _method(name).spec)

    def checking(read: Any) -> Any:
        def checked(document: Any, *arguments: Any, **options: Any) -> Any:
            check(document)
            return read(document, *arguments, **options)

        return checked

    def initialising(init: Any) -> Any:
        def initialised(self: Any, /, **document: Any) -> None:
            check(document)
            init(self, **document)

        return initialised

    compat.put_in_place_of(kind, "model_validate", checking)
    compat.put_in_place_of(kind, "__init__", initialising)


def _is_ours(method: Any) -> bool:
    return type(method).__module__.startswith("mergekit_karcher.")


def _method(name: str) -> Any:
    """Our method of that name, or the refusal that stands for it."""
    if name not in _methods:
        _methods[name] = _build(name)
    return _methods[name]


def _build(name: str) -> Any:
    version = compat.installed_version()
    if version is None or version not in compat.SUPPORTED:
        return _Refusal(name, f"it was written for mergekit {_supported()}")
    try:
        return importlib.import_module("mergekit_karcher.host.methods").make_method(name)
    except Exception as error:
        _LOG.debug("mergekit-karcher could not build its method", exc_info=True)
        return _Refusal(name, f"{type(error).__name__}: {error}")


def _supported() -> str:
    """The range of versions as people write it, the lower end first."""
    ends = sorted(compat.SUPPORTED, key=lambda end: end.operator.startswith("<"))
    return ", ".join(f"{end.operator} {end.version}" for end in ends)


def _refuse_all(reason: str) -> None:
    """From here on every merge of ours is refused."""
    _methods.update({name: _Refusal(name, reason) for name in _NAMES})


def _refuse_by_name(registry: Any) -> None:
    """Have a registry whose table we do not know refuse our names when it is asked for them."""
    get = registry.get

    @functools.wraps(get)
    def refusing(name: str) -> Any:
        return _methods[name] if name in _methods else get(name)

    registry.get = refusing
    package = sys.modules.get("mergekit.merge_methods")
    if package is not None and hasattr(package, "get"):
        package.get = refusing  # type: ignore[attr-defined]


class _Refusal:
    """Stands for our method where it cannot be built: whatever a planner asks of it is refused.

    Silence would hand the user the built-in under our name.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.spec = SimpleNamespace(name=name, pretty_name=name, reference_url=None)
        version = compat.installed_version() or "of unknown version"
        self._sentence = (
            f"merge_method: {name} cannot run: mergekit-karcher {__version__} does not fit "
            f"mergekit {version} ({reason}); install a mergekit that fits, or set "
            "MERGEKIT_KARCHER=0 for mergekit's own karcher."
        )

    def refuse(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise KarcherError(self._sentence)

    __call__ = refuse

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return self.refuse
