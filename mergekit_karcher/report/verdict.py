"""What the numbers of a report mean, in a few plain sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_karcher.report.schema import Report, Tensor

# Where rounding error is this share of a difference, it is as long as the true rest (sqrt(1/2)):
# from there on angles mean nothing. Below the second share they are nearly right.
NOISE = 0.7
_SOME_NOISE = 0.3

# From here on (radians) models have nothing in common: fine-tunes of one base are a few degrees
# apart.
_STRANGERS = math.radians(60)

# Averaging task vectors that are closer than this (radians) loses little, whatever the method.
_AGREEING = math.radians(45)

# From the measurements in benchmarks/quality.
_EVIDENCE = (
    "In our measurements, keeping the full length helped fine-tunes of a 135M language model that "
    "were 0.2 degrees apart (by 0.05 to 0.07 bits per byte) and small classifiers with nearly "
    "orthogonal task vectors (by 0.5 to 1.1 points of accuracy); it hurt tiny language models that "
    "were 6 to 15 degrees apart (by 0.05 to 0.15 bits per byte), where magnitude: linear with "
    "granularity: row was best."
)

_NAMES_SHOWN = 3
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def verdict_of(report: Report) -> str:
    """Sentences that say what the numbers of a report mean, and nothing that they do not show."""
    sentences = [_apart(report), *_task_vectors(report), *_not_unique(report.tensors)]
    if report.settings.as_karcher:
        method = report.settings.merge_method
        sentences.insert(
            0,
            f"The config asks for {method}; this report shows what karcher would make of its "
            "models, weights and base.",
        )
    if report.settings.in_metric:
        sentences.insert(0, "Angles and lengths are measured in the metric that the models share.")
    return " ".join(sentences)


def _two_digits(value: float) -> str:
    """Two significant digits, or as many as the whole number has."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def output_dtype(report: Report) -> str:
    """The dtype whose rounding the merge ends with, to be followed by the word rounding."""
    return report.settings.out_dtype or report.settings.dtype or "the output's"


def _apart(report: Report) -> str:
    """How far the models are apart, and whether the method matters."""
    norms = [norm for place, norm in enumerate(report.whole.norms) if place != report.apart]
    count = sum(norm is not None for norm in norms)
    these = f"These {_NUMBERS[count] if count < len(_NUMBERS) else count} models"
    angles = report.whole.pairs(report.apart)
    if not angles:
        return f"{these} have no tensor in common whose directions could be compared."
    largest = max(angles)
    if largest == 0 and len(set(norms)) == 1:
        return f"{these} are the same, and so is every mean of them."
    far = "" if count == 2 else "up to "
    lead = f"{these} are {far}{_two_digits(math.degrees(largest))} degrees apart"
    length = report.whole.linear_length
    lost = 1 - length if length is not None else 0.0
    if largest > _STRANGERS:
        unique = all(tensor.unique for tensor in report.tensors)
        return (
            f"{lead}, like strangers: plain averaging keeps {_two_digits(100 * (1 - lost))} % of "
            f"their length, Karcher keeps {_keeps(report)}"
            f"{'' if unique else ' where the mean is unique'}, and neither makes a good network of "
            "models whose neurons are not aligned."
        )
    return (
        f"{lead}: {_difference(report)}; plain averaging loses {_two_digits(100 * lost)} % of "
        "their length."
    )


def _difference(report: Report) -> str:
    """How the Karcher mean differs from averaging scaled to the same length."""
    gaps = {t.name: t.linear_gap for t in report.tensors if t.linear_gap and t.linear_gap >= 1}
    if gaps:
        worst = max(gaps, key=gaps.__getitem__)
        return (
            f"in {len(gaps)} of {len(report.tensors)} tensors Karcher differs from averaging "
            f"scaled to the same length by more than {output_dtype(report)} rounding, most in "
            f"{worst} ({gaps[worst]:.2g} times the rounding)"
        )
    if any(tensor.granularity == "row" for tensor in report.tensors):
        return "the mean is taken row by row"
    return (
        "Karcher, SLERP and averaging scaled to the same length give the same weights to within "
        f"{output_dtype(report)} rounding"
    )


def _keeps(report: Report) -> str:
    return "no more" if report.settings.magnitude == ["linear"] else "all of it"


def _task_vectors(report: Report) -> list[str]:
    """How far the differences from the base are apart, where they are more than rounding error."""
    view, rounding = report.whole_tasks, report.whole_rounding
    if view is None or rounding is None or view.linear_length is None:
        return []
    noisy = [place for place, share in enumerate(rounding) if share is not None and share >= NOISE]
    known = [place for place, norm in enumerate(view.norms) if norm and place not in noisy]
    names = ", ".join(report.models[place].name for place in noisy)
    if len(known) < 2 and noisy:
        return [
            f"The differences of {names} from the base are hardly longer than the rounding error "
            "of the files: the angles between them mean nothing, and no merge around the base can "
            "tell them from noise."
        ]
    angles = view.pairs(*noisy)
    if not angles:
        return []
    mean = sum(angles) / len(angles)
    apart = f"{_two_digits(math.degrees(mean))} degrees apart"
    if len(angles) > 1:
        apart += " on average"
    worst = max(share for place in known if (share := rounding[place]) is not None)
    if worst >= _SOME_NOISE:
        apart += (
            f" ({_two_digits(100 * worst)} % of their length may be rounding error of the files, "
            "so do not trust that angle)"
        )
    if noisy:
        return [
            f"The task vectors of all models but {names} are {apart}; what {names} changed in the "
            "base is hardly more than rounding error, and only noise to a merge around the base."
        ]
    sentence = (
        f"Their task vectors are {apart}: averaging keeps "
        f"{_two_digits(100 * view.linear_length)} % of their length, and origin: base keeps "
        f"{_keeps(report)}."
    )
    has_evidence = mean > _AGREEING and not report.settings.in_metric
    return [sentence, _EVIDENCE] if has_evidence else [sentence]


def _not_unique(tensors: Sequence[Tensor]) -> list[str]:
    names = [tensor.name for tensor in tensors if not tensor.unique]
    if not names:
        return []
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    tensors_word = "tensor" if len(names) == 1 else "tensors"
    return [f"The mean of {len(names)} {tensors_word} could not be proven unique: {shown}{more}."]
