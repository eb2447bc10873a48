"""The merges that are compared: configs of mergekit, each with a name."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.documents import named_in, read_config

LINEAR = "linear"
GRAMS = "fisher, input Grams"

_16_BITS = ("bfloat16", "float16")


@dataclass(frozen=True)
class Candidate:
    """A merge to compare.

    name: what it is called in the tables. config: of mergekit, as a document. simplicity: its
    place from the simplest on; of merges that tie the simplest is taken.
    """

    name: str
    config: Mapping[str, Any]
    simplicity: int

    @property
    def source(self) -> str:
        """The config as YAML text."""
        return yaml.safe_dump(dict(self.config), sort_keys=False, allow_unicode=True)


# What everything is compared with, and then what gained most and most often.
_BY_EVIDENCE = (
    *(LINEAR, "fisher, self", "task_arithmetic", GRAMS, "karcher, base"),
    *("karcher, row, base, linear length", "ties", "karcher, row, base", "slerp", "karcher"),
)


def default_candidates(
    base: str, models: Sequence[str], dtype: str, grams: Mapping[str, str]
) -> list[Candidate]:
    """The merges of the README's table, those first that gained most in docs/evidence.md.

    Arguments:
        base: What the models were fine-tuned from.
        models: The models.
        dtype: That of the models; merges are computed in float32 and saved in it.
        grams: Where the input Grams of each model will be; empty without.
    """
    rows = {"granularity": "row", "origin": "base"}
    plain = _inputs(models)
    # The simplest first.
    merges: dict[str, dict[str, Any]] = {LINEAR: {"merge_method": "linear", "models": plain}}
    if len(models) == 2:
        both = [{"model": model} for model in models]
        merges["slerp"] = {"merge_method": "slerp", "base_model": models[0], "models": both}
        merges["slerp"]["parameters"] = {"t": 0.5}
    merges["karcher"] = {"merge_method": "karcher", "models": plain}
    around_base = {
        "task_arithmetic": ("task_arithmetic", {"lambda": 0.7}),
        "karcher, base": ("karcher", {"origin": "base"}),
        "ties": ("ties", {"density": 0.2}),
        "karcher, row, base": ("karcher", rows),
        "karcher, row, base, linear length": ("karcher", rows | {"magnitude": "linear"}),
        "fisher, self": ("fisher", {"metric": "self", "ridge": 0.3}),
    }
    for name, (method, parameters) in around_base.items():
        config = {"merge_method": method, "base_model": base, "models": plain}
        merges[name] = config | {"parameters": parameters}
    if grams:
        inputs = _inputs(models, grams)
        merges[GRAMS] = {"merge_method": "fisher", "models": inputs, "parameters": {"ridge": 0.1}}
    common = {"dtype": "float32"} | ({"out_dtype": dtype} if dtype in _16_BITS else {})
    places = {name: place for place, name in enumerate(merges)}
    return [
        Candidate(name, copy.deepcopy(merges[name]) | common, places[name])
        for name in _BY_EVIDENCE
        if name in merges
    ]


def _inputs(models: Sequence[str], metrics: Mapping[str, str] | None = None) -> list[Any]:
    """The models of a config, all of one weight, each with its metric if there are any."""
    return [
        {
            "model": model,
            "parameters": {"weight": 1.0} | ({"metric": metrics[model]} if metrics else {}),
        }
        for model in models
    ]


def candidates_of(paths: Sequence[Path]) -> list[Candidate]:
    """Those of some configs, linear ones first, else in their order; it counts as simplicity.

    Raises KarcherError if one is no config of mergekit-yaml, or two have the same file name.
    """
    configs: dict[str, dict[str, Any]] = {}
    for path in paths:
        if path.stem in configs:
            raise KarcherError(f"Two configs are called {path.stem}: rename one of them.")
        configs[path.stem] = read_config(path)
    names = sorted(configs, key=lambda name: configs[name]["merge_method"] != LINEAR)
    return [Candidate(name, configs[name], place) for place, name in enumerate(names)]


def models_of(candidates: Sequence[Candidate]) -> list[str]:
    """Every model that they name, the first base first."""
    bases = (named_in(dict(one.config), ("base_model",)) for one in candidates)
    named = (named_in(dict(one.config)) for one in candidates)
    return list(dict.fromkeys([name for names in (*bases, *named) for name in names]))
