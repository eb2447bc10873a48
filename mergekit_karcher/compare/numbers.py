"""The numbers of a config that can be searched for: lengths, ridges and weights of models."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The length of the merged change, for the methods of mergekit that have one.
_LENGTH = "lambda"
_WITH_LENGTH = (
    *("task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear"),
    *("breadcrumbs", "breadcrumbs_ties"),
)
_WITH_RIDGE = ("fisher", "regmean")

# Where each number is searched for.
_LENGTHS, _RIDGES, _WEIGHTS = (0.05, 2.0), (0.01, 10.0), (0.0, 3.0)

# By which part of their names tensors of a kind are known, in one family or another.
_KINDS = (("self_attn", "attention", "attn"), ("mlp", "feed_forward", "intermediate"))


@dataclass(frozen=True)
class Number:
    """A number of a config.

    name: what it is called. path: the keys to it. before: what it is, where nothing is said its
    default. low, high: where it is searched for. by_factors: whether factors matter and not
    differences.
    """

    name: str
    path: tuple[str | int, ...]
    before: float
    low: float
    high: float
    by_factors: bool = False


def with_value(config: Mapping[str, Any], number: Number, value: float) -> dict[str, Any]:
    """A config with another value for a number."""
    changed: Any = copy.deepcopy(dict(config))
    part = changed
    for key in number.path[:-1]:
        part = part.setdefault(key, {}) if isinstance(key, str) else part[key]
    part[number.path[-1]] = value
    result: dict[str, Any] = changed
    return result


def numbers_of(config: Mapping[str, Any]) -> list[Number]:
    """The numbers that a config has once: its length, its ridge, or slerp's t.

    Those that a config gives by layers or filters are left as they are.
    """
    method = config["merge_method"]
    given = config.get("parameters") or {}
    numbers = []
    if method in _WITH_LENGTH and _is_number(given.get(_LENGTH, 1.0)):
        before = float(given.get(_LENGTH, 1.0))
        numbers.append(Number(_LENGTH, ("parameters", _LENGTH), before, *_LENGTHS))
    if method in _WITH_RIDGE and _is_number(given.get("ridge")):
        path, before = ("parameters", "ridge"), float(given["ridge"])
        numbers.append(Number("ridge", path, before, *_RIDGES, by_factors=True))
    if method == "slerp" and _is_number(given.get("t")):
        numbers.append(Number("t", ("parameters", "t"), float(given["t"]), 0.0, 1.0))
    return numbers


def weights_of(config: Mapping[str, Any], names: Mapping[str, str]) -> list[Number]:
    """The weights of all models but the first, whose weight the others are relative to.

    names: what each model is called.
    """
    numbers = []
    for place, entry in enumerate(config.get("models") or ()):
        weight = (entry.get("parameters") or {}).get("weight")
        if not (_is_number(weight) and weight):
            continue
        path = ("models", place, "parameters", "weight")
        name = f"weight of {names.get(entry['model'], entry['model'])}"
        low, high = (float(weight) * bound for bound in _WEIGHTS)
        numbers.append(Number(name, path, float(weight), low, high))
    return numbers[1:]


def lengths_by_kind(
    config: Mapping[str, Any], tensors: Iterable[str]
) -> tuple[dict[str, Any], list[Number]]:
    """A config that has its length once for each kind of module, and these numbers.

    tensors: the names of the model's. Without a length there are no numbers.
    """
    whole = [number for number in numbers_of(config) if number.name == _LENGTH]
    kinds = list(_filters(list(tensors)))
    if not whole or not kinds:
        return dict(config), []
    before = whole[0].before
    by_kind: list[dict[str, Any]] = [{"filter": kind, "value": before} for kind in kinds]
    numbers = [
        Number(f"{_LENGTH} of {kind}", (*whole[0].path, place, "value"), before, *_LENGTHS)
        for place, kind in enumerate([*kinds, "the rest"])
    ]
    changed = copy.deepcopy(dict(config))
    changed["parameters"] = {
        **changed.get("parameters", {}),
        _LENGTH: [*by_kind, {"value": before}],
    }
    return changed, numbers


def _filters(tensors: Sequence[str]) -> Iterator[str]:
    for words in _KINDS:
        used = (word for word in words if any(word in name for name in tensors))
        yield from list(used)[:1]


def _is_number(value: Any) -> bool:
    """Whether it is one number, and not one for each layer or filter."""
    return isinstance(value, int | float) and not isinstance(value, bool)
