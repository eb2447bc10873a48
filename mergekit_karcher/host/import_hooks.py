"""Runs a function of ours the moment a module of mergekit is complete.

`import torch` calls `install` through the entry point group `torch.backends`, in every program that
imports torch: so it is quick, never raises, and imports nothing but the standard library.
"""

import importlib
import importlib.abc
import importlib.machinery
import logging
import os
import sys
import threading
import types
import typing

LOG = logging.getLogger(__name__)

# What to call in mergekit_karcher.host.install once a module's own code has run.
HOOKS = {
    "mergekit.merge_methods.karcher": "replace_builtin",
    "mergekit.merge_methods.registry": "register_methods",
    "mergekit.config": "patch_config",
    "mergekit.plan": "patch_planner",
    "mergekit.scripts.merge_raw_pytorch": "patch_flat_planner",
    # A module of the two above may be what imports torch, and so us: its loader is chosen already,
    # and its hook has to wait until it is complete. These come later.
    "mergekit.options": "patch_options",
    "mergekit.merge": "watch_again",
}


# The modules whose hook has been called, by name.
_hooked: typing.Dict[str, types.ModuleType] = {}


def install() -> None:
    """Watch for mergekit, unless MERGEKIT_KARCHER=0 asks for the built-in. Idempotent."""
    if os.environ.get("MERGEKIT_KARCHER") == "0":
        return
    try:
        watch()
    except Exception:
        # An exception here would break `import torch` for every program.
        LOG.debug("mergekit-karcher could not be installed", exc_info=True)


def watch() -> None:
    """Run the hooks of the modules that are there already, and of the others when they come."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in HOOKS:
        module = sys.modules.get(name)
        if module is None or module is _hooked.get(name):
            continue
        if not getattr(module.__spec__, "_initializing", False):
            _run_hook(module)


def _run_hook(module: types.ModuleType) -> None:
    _hooked[module.__name__] = module
    try:
        hooks = importlib.import_module("mergekit_karcher.host.install")
        getattr(hooks, HOOKS[module.__name__])(module)
    except Exception as error:
        LOG.warning(
            "mergekit-karcher could not take its place in %s: %r; what that module does for it is "
            "missing, such as the check of parameter names.",
            module.__name__,
            error,
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules above by asking the other finders, and wraps their loader."""

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(
        self,
        fullname: str,
        path: typing.Optional[typing.Sequence[str]] = None,
        target: typing.Optional[types.ModuleType] = None,
    ) -> typing.Optional[importlib.machinery.ModuleSpec]:
        if fullname not in HOOKS or getattr(self._asking, "now", False):
            return None
        # Another post-import hook may ask all finders too, us among them.
        self._asking.now = True
        try:
            for finder in sys.meta_path:
                find_spec = getattr(finder, "find_spec", None)
                spec = find_spec(fullname, path, target) if find_spec else None
                if isinstance(spec, importlib.machinery.ModuleSpec):
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader)
                    return spec
        finally:
            self._asking.now = False
        return None


class _Loader(importlib.abc.Loader):
    """Runs the module's own loader, puts it back, then runs the hook.

    Whatever else a loader is asked for (source, code, resources) the module's own one answers.
    """

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self._loader, name)

    def create_module(
        self, spec: importlib.machinery.ModuleSpec
    ) -> typing.Optional[types.ModuleType]:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _run_hook(module)
