"""The exact, weighted Karcher mean of model weights, as a mergekit merge method.

Importing this package loads neither torch nor mergekit; the public names are loaded on first use.
"""

import importlib
import typing

__version__ = "0.1.0"

_PUBLIC = {
    "InputGram": "mergekit_karcher.means.input_gram",
    "KarcherError": "mergekit_karcher.errors",
    "KarcherMean": "mergekit_karcher.means.result",
    "Status": "mergekit_karcher.sphere.results",
    "fisher_mean": "mergekit_karcher.means.fisher",
    "karcher_mean": "mergekit_karcher.means.karcher",
    "register": "mergekit_karcher.host.install",
}

__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> object:
    try:
        module = _PUBLIC[name]
    except KeyError:
        raise AttributeError("module {!r} has no attribute {!r}".format(__name__, name)) from None
    return getattr(importlib.import_module(module), name)


def __dir__() -> typing.List[str]:
    return sorted(set(globals()) | set(__all__))
