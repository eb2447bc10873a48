"""What compare.json holds. Costs are bits per byte, or for classifiers the share of errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_karcher.compare.noise import (
    Difference,
    mean_difference,
    paired_difference,
    rate,
)
from mergekit_karcher.errors import KarcherError

SCHEMA = "mergekit-karcher/compare/1"
JSON = "compare.json"

# In bits per byte, or as a share of errors.
MOST_OF_A_TIE = 0.01

Kind = Literal["base", "model", "merge"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextResult(_Part):
    """A text, by its windows.

    choosing, reporting: for each window what its cost is divided by, in bytes, or 1 for a record.
    """

    name: str
    choosing: list[int]
    reporting: list[int]


class Score(_Part):
    """How good a merge or model is on the windows for one purpose; less is better.

    costs: of each window, by text. rates: of each text. mean, worst: over texts. difference: the
    mean over texts of the paired differences to the reference. error: its standard error.
    """

    costs: dict[str, list[float]]
    rates: dict[str, float]
    mean: float
    worst: float
    difference: float | None = None
    error: float | None = None


class Tuned(_Part):
    """A number of a config that was searched for on the windows to choose by, and on no others.

    name: which. value: the best. before: what it was. evaluations: how many values were tried.
    """

    name: str
    value: float
    before: float
    evaluations: int


class Entry(_Part):
    """A merge, or a model alone.

    config: of a merge, with short names for models. simplicity: the place of a merge from the
    simplest on. tuned: what of it was tuned, on the choosing windows.
    """

    name: str
    kind: Kind
    config: dict[str, Any] | None = None
    simplicity: int = 0
    tuned: list[Tuned] = []
    choosing: Score
    reporting: Score


class LeftOut(_Part):
    """A merge without a result, and why."""

    name: str
    why: str


class Comparison(_Part):
    """Merges of the same models, judged alike.

    measure: what costs are. length: the most tokens of a window. reference: the merge that the
    others are compared with. best: the merge with the least mean on the choosing windows. chosen:
    the simplest of those that tie with it.
    """

    schema_: str = Field(SCHEMA, alias="schema", pattern=f"^{SCHEMA}$")
    versions: dict[str, str]
    measure: Literal["bits per byte", "errors"]
    device: str
    dtype: str
    length: int
    texts: list[TextResult]
    entries: list[Entry]
    left_out: list[LeftOut]
    reference: str
    best: str
    chosen: str

    def entry(self, name: str) -> Entry:
        """The merge with that name."""
        return next(e for e in self.entries if e.name == name and e.kind == "merge")

    @property
    def merges(self) -> list[Entry]:
        """All merges, the best on the choosing windows first."""
        merges = (entry for entry in self.entries if entry.kind == "merge")
        return sorted(merges, key=lambda entry: entry.choosing.mean)

    @property
    def models(self) -> list[Entry]:
        """The base and the models alone."""
        return [entry for entry in self.entries if entry.kind != "merge"]


def score(
    costs: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Sequence[int]],
    reference: Mapping[str, Sequence[float]] | None,
) -> Score:
    """What some costs are, and how they differ from those of the reference; by text."""
    rates = {name: rate(values, sizes[name]) for name, values in costs.items()}
    against = None if reference is None else difference(costs, reference, sizes)
    return Score(
        costs={name: list(values) for name, values in costs.items()},
        rates=rates,
        mean=sum(rates.values()) / len(rates),
        worst=max(rates.values()),
        difference=None if against is None else against.value,
        error=None if against is None else against.error,
    )


def difference(
    costs: Mapping[str, Sequence[float]],
    others: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Sequence[int]],
) -> Difference:
    """How much larger costs are than others, over all texts."""
    return mean_difference(
        [paired_difference(costs[name], others[name], sizes[name]) for name in costs]
    )


def choose(entries: Sequence[Entry], sizes: Mapping[str, Sequence[int]]) -> tuple[Entry, Entry]:
    """The merge with the least mean on the choosing windows, and the simplest that ties with it.

    A merge ties if it is worse by at most one standard error of the paired difference, and not by
    more than MOST_OF_A_TIE, which a merge of great noise could otherwise be.
    """
    best = min(entries, key=lambda entry: entry.choosing.mean)

    def ties(entry: Entry) -> bool:
        worse = difference(entry.choosing.costs, best.choosing.costs, sizes)
        return worse.value <= min(worse.error, MOST_OF_A_TIE)

    tied = [entry for entry in entries if ties(entry)]
    return best, min(tied, key=lambda entry: (len(entry.tuned), entry.simplicity))


def read(folder: Path) -> Comparison:
    """The comparison in a folder; raises KarcherError if there is none that can be read."""
    path = folder / JSON
    try:
        return Comparison.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError:
        raise KarcherError(f"There is no comparison at {path}.") from None
    except ValidationError:
        raise KarcherError(
            f"{path} is not a comparison of the kind {SCHEMA}: make it again with this version of "
            "mergekit-karcher."
        ) from None
