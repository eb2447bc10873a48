"""Which merge suits the models of a report, by the evidence in docs/evidence.md."""

from __future__ import annotations

from typing import Any, NamedTuple

from mergekit_karcher.report.schema import Report
from mergekit_karcher.report.verdict import (
    are_unrelated,
    evenly_changed,
    is_crowded,
    strangers,
)


class Suggestion(NamedTuple):
    """A merge that suits some models.

    sentence: What to do, and why.
    settings: Of a config of mergekit, all but its models and dtypes; with the name of a base only
        where `around_base`.
    of_each: The parameters of each model.
    around_base: Whether the merge needs the base.
    """

    sentence: str
    settings: dict[str, Any]
    of_each: dict[str, Any]
    around_base: bool


def suggestion_of(report: Report) -> Suggestion:
    """The merge that was best where models were like these.

    report: of the weights themselves, with the base if there is one.
    """
    has_base = any(model.is_base for model in report.models)
    if are_unrelated(report):
        return _around_zero(
            "Suggestion: align the models with mergekit-karcher align before any merge. As they "
            "are, no merge of them makes a good network; magnitude: linear does the least harm.",
            magnitude="linear",
        )
    if not has_base:
        return _around_zero(
            "Suggestion: karcher with its defaults, which gives what linear gives where models are "
            "close. If you have the base that they were trained from, name it: merges of the "
            "changes were better in nearly every set that we measured."
        )
    if strangers(report):
        return _around_zero(
            "Suggestion: karcher with its defaults and without that base, which not all of them "
            "were trained from."
        )
    if report.whole_tasks is None or len(report.noise) >= _changed(report) - 1:
        return _around_zero(
            "Suggestion: karcher with its defaults, since fewer than two models differ from the "
            "base by more than the rounding error of their files."
        )
    if is_crowded(report):
        return _linear(
            "Suggestion: linear. No merge that we measured was better for models that ask for more "
            "than their network holds."
        )
    if evenly_changed(report):
        return _linear(
            "Suggestion: linear. No merge without data that we measured was better by more than "
            "0.01 bits per byte for models like these. If you have some of their training data, "
            "merge_method: fisher in metrics from it was."
        )
    return Suggestion(
        "Suggestion: merge_method: fisher with metric: self, which needs no data and was better "
        "than linear and than task arithmetic at its best scale in nearly every set of fine-tunes "
        "like these that we measured.",
        {"merge_method": "fisher"},
        {"weight": 1.0, "metric": "self"},
        around_base=True,
    )


def _linear(sentence: str) -> Suggestion:
    return Suggestion(sentence, {"merge_method": "linear"}, {"weight": 1.0}, around_base=False)


def _around_zero(sentence: str, **parameters: str) -> Suggestion:
    settings: dict[str, Any] = {"merge_method": "karcher"}
    if parameters:
        settings["parameters"] = parameters
    return Suggestion(sentence, settings, {"weight": 1.0}, around_base=False)


def _changed(report: Report) -> int:
    """How many models are not the base."""
    return sum(not model.is_base for model in report.models)
