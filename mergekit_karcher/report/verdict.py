"""What the numbers of a report mean, in a few plain sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_karcher.report.apart import Apart, apart, average, plain
from mergekit_karcher.report.schema import Report, Tensor

# Below NOISE, but from here on, rounding error is enough of a difference to change its angles.
_SOME_NOISE = 0.3

# From here on (radians) models have nothing in common: fine-tunes of one base are a few degrees
# apart.
_UNRELATED = math.radians(60)

# Up to here (radians) fine-tunes of one base are as close as most are.
_CLOSE = math.radians(5)

# Averaging task vectors that are closer than this (radians) loses little, whatever the method.
_AGREEING = math.radians(45)

# A difference of two merges that is a smaller part of their length is practically none: rounding to
# bfloat16 may change any number by as much, and nobody notices that.
_PRACTICALLY_NONE = 2**-8

# With more models than this at the same inputs, less than half of each change is left.
_FEW_AT_ONE_INPUT = 2

# Where the changes are longer than this part of the base, and in some kind of module take together
# more than this part of all directions of the inputs. Of the sets of docs/evidence.md only the one
# in which no merge was better than linear has both.
_LONG, _FULL = 0.5, 0.4

# Where a model's change takes more than this part of all directions of its inputs, it takes nearly
# all of them alike. In the sets of docs/evidence.md only Muon's changes do, with 0.6; those of Adam
# and SGD take 0.02 to 0.2.
_EVEN = 0.4

# Tensors with a smaller part of all parameters are an exception, and not what a merge is like.
_FEW = 0.1

_EVIDENCE = (
    "Whether keeping the full length helps has to be tried: it helped fine-tunes of a 135M "
    "language model that were 0.2 degrees apart, and small classifiers; it hurt tiny language "
    "models that were 6 to 15 degrees apart, where magnitude: linear with granularity: row was "
    "best (docs/evidence.md has the numbers)."
)

_NAMES_SHOWN = 3
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def verdict_of(report: Report) -> str:
    """Sentences that say what the numbers of a report mean, and nothing that they do not show."""
    sentences = [
        _models(report),
        *_task_vectors(report),
        *_inputs(report),
        *_not_unique(report.tensors),
    ]
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


def advice_on(report: Report) -> str | None:
    """What is known of models like these, beyond what the report shows."""
    average_angle = report.overall.task_angle_average or 0.0
    noisy = report.noise or report.settings.in_metric
    asked = report.whole_tasks and not report.overall.shares
    return _EVIDENCE if asked and not noisy and average_angle > _AGREEING else None


def relation(report: Report) -> str:
    """How the models relate, as one sentence for those who have not seen the config."""
    models = _apart(report, "zero")
    if _are_equal(report):
        return f"{_these(report)} have the same weights."
    if models.average is None:
        return f"{_these(report)} have no tensor in common whose directions could be compared."
    degrees = plain(math.degrees(models.average))
    return f"{_kin(report, models.average)}: their weights are {degrees} degrees apart on average."


def _kin(report: Report, angle: float) -> str:
    """What models that are that far apart are to each other."""
    if angle > _UNRELATED:
        return f"{_these(report)} are unrelated"
    if angle > _CLOSE:
        return f"{_these(report)} are related, but far apart"
    return f"{_these(report)} are closely related"


def _these(report: Report) -> str:
    norms = [norm for place, norm in enumerate(report.whole.norms) if place != report.apart]
    count = sum(norm is not None for norm in norms)
    return f"These {_NUMBERS[count] if count < len(_NUMBERS) else count} models"


def _are_equal(report: Report) -> bool:
    angles = report.whole.pairs(report.apart)
    norms = {norm for place, norm in enumerate(report.whole.norms) if place != report.apart}
    return bool(angles) and max(angles) == 0 and len(norms) == 1


def _apart(report: Report, origin: str) -> Apart:
    base = next((place for place, model in enumerate(report.models) if model.is_base), None)
    return apart(report.tensors, origin, base, report.noise if origin == "base" else ())


def _percent(share: float | None) -> str:
    return f"{plain(100 * (share or 0.0))} %"


def _models(report: Report) -> str:
    """How far the models are apart, and whether the method matters."""
    these, models = _these(report), _apart(report, "zero")
    far = models.words
    if models.average is None:
        return relation(report)
    if _are_equal(report):
        return f"{these} are the same, and so is every mean of them."
    if report.overall.shares:
        return f"{relation(report)} {_counts(report)}"
    kept = report.overall.linear_length_average or 0.0
    loses = f"plain averaging loses {_percent(1 - kept)} of their length"
    if models.average > _UNRELATED:
        unique = all(tensor.unique for tensor in report.tensors)
        return (
            f"{_kin(report, models.average)}: their weights are {far}. Plain averaging keeps "
            f"{_percent(kept)} of their length, karcher keeps {_keeps(report)}"
            f"{'' if unique else ' where the mean is unique'}, and neither makes a good network of "
            "models whose neurons are not aligned."
        )
    if report.apart is not None:
        return f"{_kin(report, models.average)}: their weights are {far}, and {loses}."
    return f"For {these[0].lower()}{these[1:]}, {_difference(report)}. They are {far}, and {loses}."


def _difference(report: Report) -> str:
    """Whether the Karcher mean is another one than plain averaging."""
    different = [tensor for tensor in report.tensors if _unlike_linear(tensor) > _PRACTICALLY_NONE]
    share = sum(tensor.size for tensor in different) / max(1, report.overall.parameters)
    if not different:
        return "karcher gives practically the same as linear"
    worst = max(different, key=_unlike_linear).name
    if share < _FEW:
        several = f"{len(different)} tensors (most in {worst})"
        return (
            "karcher gives practically the same as linear except in "
            f"{worst if len(different) == 1 else several}, with {_percent(share)} of the parameters"
        )
    where = "" if share == 1 else f" in {_percent(share)} of the parameters (most in {worst})"
    by = average([(tensor.linear_difference, tensor.size) for tensor in different])
    amount = "" if by is None else f", by {_percent(by)} of their length"
    return f"karcher and linear give different weights{where}{amount}"


def _unlike_linear(tensor: Tensor) -> float:
    """How much of the length of a tensor depends on karcher or linear; row by row at most."""
    if tensor.linear_difference is not None:
        return tensor.linear_difference
    # A row is the shorter in a linear mean, the farther the models are from its direction.
    return 1 - math.cos(min(tensor.spread or 0.0, math.pi / 2))


def _keeps(report: Report) -> str:
    return "no more" if report.settings.magnitude == ["linear"] else "all of it"


def _counts(report: Report) -> str:
    """How much each model counts where fisher merges."""
    by_model = zip(report.models, report.overall.shares or [], strict=True)
    shares = {model.name: share for model, share in by_model if share is not None}
    first, *others = sorted(shares, key=shares.__getitem__, reverse=True)[:_NAMES_SHOWN]
    share, place, kind = max(
        (share or 0.0, place, kind.kind)
        for kind in report.kinds
        for place, share in enumerate(kind.shares or [])
    )
    counts = ", ".join(
        [f"{first} counts for {_percent(shares[first])}"]
        + [f"{name} for {_percent(shares[name])}" for name in others]
    )
    return (
        f"In the fisher mean {counts}, on average over all parameters; {kind} is the most "
        f"one-sided, where {report.models[place].name} counts for {_percent(share)}."
    )


def _task_vectors(report: Report) -> list[str]:
    """How far the differences from the base are apart, where they are more than rounding error."""
    view, rounding = report.whole_tasks, report.whole_rounding
    if view is None or rounding is None or report.overall.shares:
        return []
    noisy = report.noise
    known = [place for place, norm in enumerate(view.norms) if norm and place not in noisy]
    names = ", ".join(report.models[place].name for place in noisy)
    if len(known) < 2 and noisy:
        return [
            f"The changes that {names} made to the base are hardly longer than the rounding error "
            "of the files: the angles between them mean nothing, and no merge around the base can "
            "tell them from noise."
        ]
    tasks = _apart(report, "base")
    if tasks.average is None:
        return []
    far = tasks.words
    worst = max(share for place in known if (share := rounding[place]) is not None)
    if worst >= _SOME_NOISE:
        far += (
            f" ({_percent(worst)} of their length may be rounding error of the files, so do not "
            "trust that angle)"
        )
    if noisy:
        return [
            f"The changes that all models but {names} made to the base are {far}; what {names} "
            "changed is hardly more than rounding error, and only noise to a merge around the base."
        ]
    return [
        f"Their changes from the base are {far}: averaging keeps "
        f"{_percent(report.overall.task_linear_length_average)} of their length, and origin: base "
        f"keeps {_keeps(report)}."
    ]


def relations(report: Report) -> list[str]:
    """How the models relate to each other and to the base, in at most four sentences."""
    return [relation(report), *_task_vectors(report), *_inputs(report)]


def strangers(report: Report) -> dict[str, float]:
    """How long the changes are, beside the base, of models that are no fine-tunes of it."""
    return {name: times for name, times in _lengths(report).items() if times >= 1}


def is_crowded(report: Report) -> bool:
    """Whether the models may ask for more than their network holds."""
    lengths = _lengths(report)
    if report.overall.input_overlap_average is None or not lengths:
        return False
    long = sum(lengths.values()) / len(lengths)
    in_use = max(kind.inputs_in_use_average or 0.0 for kind in report.kinds)
    return long > _LONG and in_use > _FULL


def evenly_changed(report: Report) -> dict[str, float]:
    """The models whose changes take nearly all inputs alike, and which part of them."""
    shares = {
        model.name: average(
            [(t.inputs_of_each[place], t.size) for t in report.tensors if t.inputs_of_each]
        )
        for place, model in enumerate(report.models)
    }
    return {name: share for name, share in shares.items() if share and share > _EVEN}


def are_unrelated(report: Report) -> bool:
    """Whether the models are so far apart that they can have no base in common."""
    average_angle = _apart(report, "zero").average
    return average_angle is not None and average_angle > _UNRELATED


def _inputs(report: Report) -> list[str]:
    """What merge_method: fisher with metric: self would see of the changes from the base."""
    lengths, unlike = _lengths(report), strangers(report)
    if unlike:
        names = ", ".join(unlike)
        times = plain(max(unlike.values()))
        return [
            f"{names}: as far from the base as unrelated models are (the changes are up to {times} "
            "times as long as the base), so no fine-tune of it. Merges of changes, metric: self "
            "among them, are for fine-tunes of one base."
        ]
    overlap = report.overall.input_overlap_average
    if overlap is None or report.overall.task_is_noise:
        return []
    meeting = 1 + (len(lengths) - 1) * overlap
    keeps = (
        "can keep most of each change"
        if meeting <= _FEW_AT_ONE_INPUT
        else "draws towards the linear mean, since the models compete for the same inputs"
    )
    sentences = [
        f"The inputs that their changes respond to overlap by {plain(overlap)} (0: others, 1: the "
        f"same): merge_method: fisher with metric: self {keeps}."
    ]
    even = evenly_changed(report)
    if even:
        sentences.append(
            f"But the changes of {', '.join(even)} take up to {_percent(max(even.values()))} of "
            "all directions of their inputs, nearly all alike, as Muon's do: they do not show "
            "which inputs mattered, and metric: self was worse than linear where that was so."
        )
    if is_crowded(report):
        long = sum(lengths.values()) / len(lengths)
        kind = max(report.kinds, key=lambda kind: kind.inputs_in_use_average or 0.0)
        sentences.append(
            f"But the changes are {plain(long)} times as long as the base and take "
            f"{_percent(kind.inputs_in_use_average)} of the inputs of {kind.kind}: the models may "
            "ask for more than the network holds. Where that was so, no merge that we measured was "
            "better than linear."
        )
    return sentences


def _lengths(report: Report) -> dict[str, float]:
    """How long the change of each model is, beside the base; without those that are noise."""
    view = report.whole_tasks
    base = next((place for place, model in enumerate(report.models) if model.is_base), None)
    if view is None or base is None or not (length := report.whole.norms[base]):
        return {}
    return {
        report.models[place].name: norm / length
        for place, norm in enumerate(view.norms)
        if norm and place not in (base, *report.noise)
    }


def _not_unique(tensors: Sequence[Tensor]) -> list[str]:
    names = [tensor.name for tensor in tensors if not tensor.unique]
    if not names:
        return []
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    tensors_word = "tensor" if len(names) == 1 else "tensors"
    return [f"The mean of {len(names)} {tensors_word} could not be proven unique: {shown}{more}."]
