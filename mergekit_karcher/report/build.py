"""From what was observed to the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.report.apart import apart, average
from mergekit_karcher.report.kinds import ORDER, kind_of, layer_of
from mergekit_karcher.report.observation import RMS_ROUNDING, Observation
from mergekit_karcher.report.overlap import of_inputs
from mergekit_karcher.report.schema import (
    NOISE,
    SCHEMA,
    Kind,
    Model,
    Report,
    Settings,
    Tensor,
    Vector,
    View,
    noise_in,
    seen,
)
from mergekit_karcher.report.verdict import verdict_of
from mergekit_karcher.sphere.pairwise import PairwiseGeometry, as_seen_from, joined
from mergekit_karcher.sphere.trig import Floats
from mergekit_karcher.sphere.unit_vectors import normalised

# Makes a tensor of what is known of its mean.
Described = Callable[..., Tensor]


class Planned(NamedTuple):
    """What the plan of a merge says about the report on it.

    models: by the name that observations have, in the order of the config.
    base: the name of the base among them.
    granularities: by output tensor, in the order of the plan; tied duplicates are left out.
    roundoff: the largest relative rounding error of the output's dtype; None if the output has the
        dtype of the files.
    """

    settings: Settings
    models: Mapping[str, Model]
    base: str | None
    granularities: Mapping[str, str]
    roundoff: float | None


def build(
    planned: Planned,
    observations: Mapping[str, Observation],
    means: Mapping[str, KarcherMean],
    shares: Mapping[str, Floats] | None = None,
) -> Report:
    """The report on all tensors of a merge that were observed, which buffers never are.

    Arguments:
        planned: What the plan says.
        observations: By output tensor.
        means: By output tensor, over the inputs that have a weight; empty for fisher.
        shares: Of fisher, how much each of those inputs counts, by output tensor.

    Raises:
        KarcherError: If no tensor was observed.
    """
    models = list(planned.models)
    observed = [
        observations[name].among(models) for name in planned.granularities if name in observations
    ]
    if not observed:
        raise KarcherError(
            "There is nothing to report on: this config merges no tensor of floating-point numbers."
        )
    base = models.index(planned.base) if planned.base in models else None
    whole = joined([observation.zero for observation in observed])
    tasks, rounding = _whole_tasks(whole, base, observed)
    noise = noise_in(rounding)
    tensors = [
        _weighed(described, observation, shares[observation.name])
        if shares
        else _tensor(planned, described, observation, means[observation.name])
        for observation in observed
        for described in [_described(planned, observation, noise)]
    ]
    of_kinds = {kind: [tensor for tensor in tensors if tensor.kind == kind] for kind in ORDER}
    report = Report(
        schema=SCHEMA,
        version=__version__,
        settings=planned.settings,
        models=list(planned.models.values()),
        whole=_view("zero", whole, _whole_linear_length("zero", whole, observed)),
        whole_tasks=tasks,
        whole_rounding=rounding,
        verdict="",
        overall=_kind("all", tensors, base, noise),
        kinds=[_kind(kind, of_kind, base, noise) for kind, of_kind in of_kinds.items() if of_kind],
        tensors=tensors,
    )
    return report.model_copy(update={"verdict": verdict_of(report)})


def _tensor(
    planned: Planned, described: Described, observation: Observation, mean: KarcherMean
) -> Tensor:
    """A tensor that karcher merges."""
    weights, sphere, shares = observation.weights, observation.sphere, _shares(observation)
    coefficients, gap, difference = None, None, None
    if planned.granularities[observation.name] == "row":
        angles = _over_models(mean.angles, weights)
    else:
        coefficients = _over_models(mean.coefficients, weights)
        known = np.nan_to_num(coefficients)
        angles = np.where(np.isfinite(weights), sphere.angles_to(known), np.nan)
        # What rounding took from the files cannot be told apart in the output either.
        roundoff = max(planned.roundoff or 0.0, float(np.nanmin(observation.roundoffs)))
        unit = roundoff * RMS_ROUNDING * _mean_norm(observation.zero, shares)
        distance = sphere.chord_between(known, shares) * _mean_norm(sphere, shares)
        gap = _listed(distance / (unit or np.nan))
        length = _length(sphere, known)
        difference = _listed(_length(sphere, known - shares) / (length or np.nan))
    directed = np.isfinite(angles)
    squared = shares[directed] @ angles[directed] ** 2 / (shares[directed].sum() or 1)
    return described(
        coefficients=None if coefficients is None else _listed(coefficients),
        angles_to_mean=_listed(angles),
        spread=float(np.sqrt(squared)) if directed.any() else None,
        unique=mean.unique,
        status=mean.status.name.lower(),
        linear_gap=gap,
        linear_difference=difference,
    )


def _weighed(described: Described, observation: Observation, shares: Floats) -> Tensor:
    """A tensor that fisher merges."""
    return described(
        coefficients=None,
        angles_to_mean=[None] * len(observation.weights),
        spread=None,
        unique=True,
        status="converged",
        linear_gap=None,
        linear_difference=None,
        shares=_listed(_over_models(shares, observation.weights)),
    )


def _described(planned: Planned, observation: Observation, noise: Sequence[int]) -> Described:
    """A tensor, but for what is known of its mean; noise: models whose changes are only that."""
    name, origin, sphere = observation.name, observation.origin, observation.sphere
    other = "zero" if origin == "base" else "base"
    from_other, base, shares = observation.view(other), observation.base, _shares(observation)
    return partial(
        Tensor,
        name=name,
        shape=list(observation.shape),
        kind=kind_of(name),
        layer=layer_of(name),
        granularity=planned.granularities[name],
        **dict(_view(origin, sphere, sphere.linear_length(shares))),
        other=_view(other, from_other, from_other.linear_length(shares)) if from_other else None,
        rounding=_listed(_rounding(observation) / _unless_zero(base.norms)) if base else None,
        **of_inputs(observation.input_products, shares, noise),
    )


def _length(sphere: PairwiseGeometry, coefficients: Floats) -> float:
    """|sum k_i W_i|; the coefficients of missing vectors do not count."""
    known = sphere.norms > 0
    parts = coefficients[known] * sphere.norms[known]
    squared = parts.sum() ** 2 - parts @ sphere.chords[np.ix_(known, known)] @ parts / 2
    return float(np.sqrt(max(0.0, squared)))


def _over_models(values: Floats, weights: Floats) -> Floats:
    """Values of the inputs that have a weight, (N,), over all models, with NaN for the others."""
    result = np.full(len(weights), np.nan)
    result[np.isfinite(weights)] = values
    return result


def _rounding(observation: Observation) -> Floats:
    """The length of what rounding may have changed in each model, (N,)."""
    lengths: Floats = RMS_ROUNDING * observation.roundoffs * observation.zero.norms
    return lengths


def _unless_zero(norms: Floats) -> Floats:
    return np.where(norms > 0, norms, np.nan)


def _whole_tasks(
    whole: PairwiseGeometry, base: int | None, observed: Sequence[Observation]
) -> tuple[View | None, Vector | None]:
    """Whole models as seen from the base, and how much of their differences may be rounding."""
    if base is None:
        return None, None
    sphere = as_seen_from(whole, base)
    tasks = _view("base", sphere, _whole_linear_length("base", sphere, observed))
    if not tasks.pairs():
        return None, None
    rounding = np.sqrt(np.nansum([_rounding(observation) ** 2 for observation in observed], 0))
    return tasks, _listed(rounding / _unless_zero(sphere.norms))


def _whole_linear_length(
    origin: str, whole: PairwiseGeometry, observed: Sequence[Observation]
) -> float:
    """`View.linear_length` of whole models; weights may differ from tensor to tensor."""
    parts = []
    for observation in observed:
        if view := observation.view(origin):
            shares = _shares(observation)
            norm, length = _mean_norm(view, shares), view.linear_length(shares)
            if norm > 0 and np.isfinite(length):
                parts.append((shares, norm, length))
    if not parts:
        return np.nan
    if all(np.array_equal(shares, parts[0][0]) for shares, *_ in parts):
        return whole.linear_length(parts[0][0])
    norms = np.array([norm for _, norm, _ in parts])
    merged = norms * np.array([length for *_, length in parts])
    return float(np.linalg.norm(merged) / np.linalg.norm(norms))


def _view(origin: str, sphere: PairwiseGeometry, linear_length: float) -> View:
    return View(
        origin=origin,
        norms=_listed(sphere.norms),
        angles=_listed(sphere.angles),
        linear_length=_listed(linear_length),
    )


def _mean_norm(sphere: PairwiseGeometry, shares: Floats) -> float:
    """The weighted mean of the norms of those that have one."""
    known = np.isfinite(sphere.norms) & (shares > 0)
    return float(normalised(shares[known]) @ sphere.norms[known]) if known.any() else 0.0


def _shares(observation: Observation) -> Floats:
    """Weights that sum to one; zero for models without one (NaN)."""
    return normalised(np.nan_to_num(observation.weights))


def _kind(kind: str, tensors: Sequence[Tensor], base: int | None, noise: Sequence[int]) -> Kind:
    from_zero, from_base = seen(tensors, "zero"), seen(tensors, "base")
    weights, tasks = apart(tensors, "zero", base), apart(tensors, "base", base, noise)
    angles = [
        angle
        for tensor in tensors
        for view in seen([tensor], "zero")
        for angle in view.pairs(base if tensor.origin == "base" else None)
    ]
    gaps = [tensor.linear_gap for tensor in tensors if tensor.linear_gap is not None]
    only_noise = tasks.average is None and apart(tensors, "base", base).average is not None
    return Kind(
        kind=kind,
        tensors=len(tensors),
        parameters=sum(tensor.size for tensor in tensors),
        angle_average=weights.average,
        linear_length_average=_average_length(tensors, "zero"),
        linear_difference_average=average([(t.linear_difference, t.size) for t in tensors]),
        task_angle_average=tasks.average,
        task_angle_largest=tasks.largest if tasks.where else None,
        task_is_noise=only_noise or (_rounding_median(tensors, noise) or 0.0) >= NOISE,
        task_linear_length_average=_average_length(tensors, "base"),
        shares=_average_shares(tensors),
        input_overlap_average=average([(t.input_overlap, t.size) for t in tensors]),
        inputs_in_use_average=average([(t.inputs_in_use, t.size) for t in tensors]),
        angle_median=_median(angles),
        angle_largest=max(angles, default=None),
        spread_median=_median(tensor.spread for tensor in tensors),
        linear_length_median=_median(view.linear_length for view in from_zero),
        linear_gap_largest=max(gaps, default=None),
        not_unique=sum(not tensor.unique for tensor in tensors),
        task_angle_median=_median(angle for view in from_base for angle in view.pairs()),
        task_linear_length_median=_median(view.linear_length for view in from_base),
        task_rounding_median=_rounding_median(tensors),
    )


def _rounding_median(tensors: Sequence[Tensor], without: Sequence[int] = ()) -> float | None:
    """Over tensors, the rounding error of the model that it may have changed most."""
    return _median(
        max(
            (
                share
                for place, share in enumerate(tensor.rounding or ())
                if share is not None and place not in without
            ),
            default=None,
        )
        for tensor in tensors
    )


def _average_length(tensors: Sequence[Tensor], origin: str) -> float | None:
    views = [(tensor.view(origin), tensor.size) for tensor in tensors]
    return average([(view.linear_length, size) for view, size in views if view])


def _average_shares(tensors: Sequence[Tensor]) -> Vector | None:
    """How much each model counts where fisher merges; in a tensor that it lacks, not at all."""
    sizes = [tensor.size for tensor in tensors if tensor.shares]
    columns = zip(*(tensor.shares for tensor in tensors if tensor.shares), strict=True)
    return [
        average([(share or 0.0, size) for share, size in zip(column, sizes, strict=True)])
        if any(share is not None for share in column)
        else None
        for column in columns
    ] or None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _listed(values: Floats | float) -> Any:
    """A number, or numbers in lists, with None for those that are not finite."""
    return np.where(np.isfinite(values), values, np.array(None)).tolist()
