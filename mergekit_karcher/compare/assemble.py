"""From what was measured to the result: each merge beside the reference, and one chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mergekit_karcher.compare.candidates import Candidate
from mergekit_karcher.compare.judge import CHOOSING, REPORTING, Costs
from mergekit_karcher.compare.result import (
    SCHEMA,
    Comparison,
    Entry,
    LeftOut,
    TextResult,
    Tuned,
    choose,
    score,
)
from mergekit_karcher.compare.texts import Text
from mergekit_karcher.host.documents import MODEL_KEYS

_PACKAGES = ("mergekit-karcher", "mergekit", "torch", "transformers")


class Measured(NamedTuple):
    """A merge and what it costs; tuned: what of it was tuned."""

    candidate: Candidate
    costs: Costs
    tuned: Sequence[Tuned] = ()


class Alone(NamedTuple):
    """A model as it is, by its short name, and what it costs."""

    name: str
    is_base: bool
    costs: Costs


class Settings(NamedTuple):
    """How all were judged, as the fields of `Comparison` say."""

    measure: Literal["bits per byte", "errors"]
    device: str
    dtype: str
    length: int


def assemble(
    settings: Settings,
    texts: Sequence[Text],
    merges: Sequence[Measured],
    alone: Sequence[Alone],
    left_out: Sequence[LeftOut],
    names: Mapping[str, str],
) -> tuple[Comparison, Candidate]:
    """Put a result together.

    Arguments:
        settings: How all were judged.
        texts: What on.
        merges: The first is what the others are compared with.
        alone: The models.
        left_out: Merges without a result.
        names: A short name of each model.

    Returns:
        The result, and the merge that was chosen.
    """

    def sizes(purpose: str) -> dict[str, Sequence[int]]:
        return {text.name: getattr(text, purpose).sizes for text in texts}

    def scores(costs: Costs) -> dict[str, Any]:
        reference = merges[0].costs
        return {p: score(costs[p], sizes(p), reference[p]) for p in (CHOOSING, REPORTING)}

    entries = [
        Entry(
            name=one.candidate.name,
            kind="merge",
            config=_with_names(one.candidate.config, names),
            simplicity=one.candidate.simplicity,
            tuned=list(one.tuned),
            **scores(one.costs),
        )
        for one in merges
    ]
    best, chosen = choose(entries, sizes(CHOOSING))
    models = [
        Entry(name=one.name, kind="base" if one.is_base else "model", **scores(one.costs))
        for one in alone
    ]
    comparison = Comparison(
        schema=SCHEMA,
        versions={package: version(package) for package in _PACKAGES},
        **settings._asdict(),
        texts=[_result_of(text) for text in texts],
        entries=[*entries, *models],
        left_out=list(left_out),
        reference=entries[0].name,
        best=best.name,
        chosen=chosen.name,
    )
    return comparison, merges[entries.index(chosen)].candidate


def _result_of(text: Text) -> TextResult:
    choosing, reporting = (list(part.sizes) for part in (text.choosing, text.reporting))
    return TextResult(name=text.name, choosing=choosing, reporting=reporting)


def _with_names(part: Any, names: Mapping[str, str]) -> Any:
    """A config without the paths of this machine."""
    if isinstance(part, list):
        return [_with_names(item, names) for item in part]
    if not isinstance(part, Mapping):
        return part
    named = {}
    for key, value in part.items():
        if key in MODEL_KEYS and isinstance(value, str):
            named[key] = names.get(value, value)
        elif key == "metric" and isinstance(value, str):
            named[key] = Path(value).name
        else:
            named[key] = _with_names(value, names)
    return named
