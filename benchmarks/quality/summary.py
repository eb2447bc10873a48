"""Rows gathered over seeds: means, standard errors, and differences to the linear merge."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from statistics import fmean, stdev
from typing import Any

from contestants import BASE, LINEAR, OWN, WITH_BASE, WITHOUT_BASE
from from_data import FROM_DATA
from rows import Row

BETTER = {"accuracy": max, "loss": min, "bits per byte": min}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error."""

    mean: float
    error: float

    def __format__(self, spec: str) -> str:
        """Both numbers, each formatted as asked; of one seed the mean alone."""
        mean = f"{self.mean:{spec}}"
        return mean if isnan(self.error) else f"{mean} ± {self.error:{spec}}"


@dataclass(frozen=True)
class Group:
    """The rows of one set that differ in seed and contestant only."""

    section: str
    case: Mapping[str, Any]
    results: Mapping[str, Mapping[int, Mapping[str, Any]]]  # by contestant and seed

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return list(next(iter(self.results[LINEAR].values()))["tasks"])

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics."""
        return list(next(iter(self.results[LINEAR].values()))["mean"])

    def estimate(self, contestant: str, *keys: str) -> Estimate:
        """What one contestant measured."""
        return _estimate([_look_up(r, keys) for r in self.results[contestant].values()])

    def minus_linear(self, contestant: str, *keys: str) -> Estimate:
        """What it measured minus what the linear merge of the same experts did."""
        own, linear = self.results[contestant], self.results[LINEAR]
        return _estimate([_look_up(own[s], keys) - _look_up(linear[s], keys) for s in own])

    def has(self, contestant: str, key: str) -> bool:
        """Whether the rows of a contestant say that."""
        return all(key in result for result in self.results[contestant].values())


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows by set and case, contestants in their own order whenever they were run."""
    order = dict.fromkeys([BASE, OWN, *WITH_BASE, *WITHOUT_BASE, *FROM_DATA])
    found: dict[tuple[str, str], dict[str, dict[int, Any]]] = {}
    # Whatever is no contestant comes first.
    ranks = {name: rank for rank, name in enumerate(order)}
    for row in sorted(rows, key=lambda row: ranks.get(row["contestant"], -1)):
        case = {key: value for key, value in row["case"].items() if key != "seed"}
        group = found.setdefault((row["section"], json.dumps(case)), {})
        group.setdefault(row["contestant"], {})[row["case"]["seed"]] = row["result"]
    return [Group(section, json.loads(case), results) for (section, case), results in found.items()]


def _estimate(values: Sequence[float]) -> Estimate:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(fmean(values), error)


def _look_up(found: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        found = found[key]
    return found
