"""From what was observed to the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.report.kinds import ORDER, kind_of, layer_of
from mergekit_karcher.report.observation import RMS_ROUNDING, Observation
from mergekit_karcher.report.schema import (
    SCHEMA,
    Kind,
    Matrix,
    Model,
    Report,
    Settings,
    Tensor,
    Vector,
    View,
)
from mergekit_karcher.report.verdict import verdict_of
from mergekit_karcher.sphere.pairwise import PairwiseGeometry, as_seen_from, joined
from mergekit_karcher.sphere.trig import Floats
from mergekit_karcher.sphere.unit_vectors import normalised


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
    planned: Planned, observations: Mapping[str, Observation], means: Mapping[str, KarcherMean]
) -> Report:
    """The report on a merge: on all its tensors that were observed, which buffers never are.

    Arguments:
        planned: What the plan says.
        observations: By output tensor.
        means: By output tensor, over its inputs that have a weight.

    Returns:
        The report, with its verdict.

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
    tensors = [_tensor(planned, observation, means[observation.name]) for observation in observed]
    whole = joined([observation.zero for observation in observed])
    tasks, rounding = _whole_tasks(whole, base, observed)
    report = Report(
        schema=SCHEMA,
        version=__version__,
        settings=planned.settings,
        models=list(planned.models.values()),
        whole=_whole_view("zero", whole, observed),
        whole_tasks=tasks,
        whole_rounding=rounding,
        verdict="",
        kinds=_kinds(tensors, base),
        tensors=tensors,
    )
    return report.model_copy(update={"verdict": verdict_of(report)})


def _tensor(planned: Planned, observation: Observation, mean: KarcherMean) -> Tensor:
    granularity = planned.granularities[observation.name]
    sphere, weights = observation.sphere, observation.weights
    coefficients, gap = None, None
    if granularity == "row":
        angles = _over_models(mean.angles, weights)
    else:
        coefficients = _over_models(mean.coefficients, weights)
        known = np.nan_to_num(coefficients)
        angles = np.where(np.isfinite(weights), sphere.angles_to(known), np.nan)
        gap = _linear_gap(observation, known, planned.roundoff)
    shares, directed = _shares(weights), np.isfinite(angles)
    squared = shares[directed] @ angles[directed] ** 2 / (shares[directed].sum() or 1)
    other = "zero" if observation.origin == "base" else "base"
    return Tensor(
        name=observation.name,
        shape=list(observation.shape),
        kind=kind_of(observation.name),
        layer=layer_of(observation.name),
        origin=observation.origin,
        granularity=granularity,
        norms=_vector(sphere.norms),
        angles=_matrix(sphere.angles),
        linear_length=_number(sphere.linear_length(shares)),
        coefficients=None if coefficients is None else _vector(coefficients),
        angles_to_mean=_vector(angles),
        spread=float(np.sqrt(squared)) if directed.any() else None,
        unique=mean.unique,
        status=mean.status.name.lower(),
        linear_gap=gap,
        other=_view(observation, other),
        rounding=_rounding(observation),
    )


def _over_models(values: Floats, weights: Floats) -> Floats:
    """Values of the inputs that have a weight, (N,), over all models, with NaN for the others."""
    result = np.full(len(weights), np.nan)
    result[np.isfinite(weights)] = values
    return result


def _linear_gap(
    observation: Observation, coefficients: Floats, output_roundoff: float | None
) -> float | None:
    """Between the Karcher mean and the linear mean of its length, in units of rounding."""
    sphere, shares = observation.sphere, _shares(observation.weights)
    # What rounding took from the files cannot be told apart in the output either.
    roundoff = max(output_roundoff or 0.0, float(np.nanmin(observation.roundoffs)))
    rounding = roundoff * RMS_ROUNDING * _mean_norm(observation.zero, shares)
    gap = sphere.chord_between(coefficients, shares) * _mean_norm(sphere, shares)
    return _number(gap / (rounding or float("nan")))


def _rounding(observation: Observation) -> Vector | None:
    """What rounding may have changed in each model, over its difference from the base."""
    if observation.base is None:
        return None
    lengths = np.where(observation.base.norms > 0, observation.base.norms, np.nan)
    return _vector(_rounding_lengths(observation) / lengths)


def _rounding_lengths(observation: Observation) -> Floats:
    """The length of what rounding may have changed in each model, (N,)."""
    lengths: Floats = RMS_ROUNDING * observation.roundoffs * observation.zero.norms
    return lengths


def _whole_tasks(
    whole: PairwiseGeometry, base: int | None, observed: Sequence[Observation]
) -> tuple[View | None, Vector | None]:
    """Whole models as seen from the base, and how much of their differences may be rounding."""
    if base is None:
        return None, None
    tasks = _whole_view("base", as_seen_from(whole, base), observed)
    if not tasks.pairs():
        return None, None
    squares = [_rounding_lengths(observation) ** 2 for observation in observed]
    rounding = np.sqrt(np.nansum(squares, 0))
    norms = np.array([norm or np.nan for norm in tasks.norms], dtype=float)
    return tasks, _vector(rounding / norms)


def _whole_view(origin: str, whole: PairwiseGeometry, observed: Sequence[Observation]) -> View:
    return View(
        origin=origin,
        norms=_vector(whole.norms),
        angles=_matrix(whole.angles),
        linear_length=_number(_whole_linear_length(origin, whole, observed)),
    )


def _whole_linear_length(
    origin: str, whole: PairwiseGeometry, observed: Sequence[Observation]
) -> float:
    """`View.linear_length` of whole models; weights may differ from tensor to tensor."""
    parts = []
    for observation in observed:
        view = observation.view(origin)
        if view is not None:
            shares = _shares(observation.weights)
            norm, length = _mean_norm(view, shares), view.linear_length(shares)
            if norm > 0 and np.isfinite(length):
                parts.append((shares, norm, length))
    if not parts:
        return float("nan")
    if all(np.array_equal(shares, parts[0][0]) for shares, *_ in parts):
        return whole.linear_length(parts[0][0])
    norms = np.array([norm for _, norm, _ in parts])
    merged = norms * np.array([length for *_, length in parts])
    return float(np.linalg.norm(merged) / np.linalg.norm(norms))


def _view(observation: Observation, origin: str) -> View | None:
    sphere = observation.view(origin)
    if sphere is None:
        return None
    return View(
        origin=origin,
        norms=_vector(sphere.norms),
        angles=_matrix(sphere.angles),
        linear_length=_number(sphere.linear_length(_shares(observation.weights))),
    )


def _mean_norm(sphere: PairwiseGeometry, shares: Floats) -> float:
    """The weighted mean of the norms of those that have one."""
    known = np.isfinite(sphere.norms) & (shares > 0)
    return float(normalised(shares[known]) @ sphere.norms[known]) if known.any() else 0.0


def _shares(weights: Floats) -> Floats:
    """Weights that sum to one; zero for models without one (NaN)."""
    shares: Floats = normalised(np.nan_to_num(weights))
    return shares


def _kinds(tensors: Sequence[Tensor], base: int | None) -> list[Kind]:
    of_kinds = {kind: [tensor for tensor in tensors if tensor.kind == kind] for kind in ORDER}
    return [_kind(kind, of_kind, base) for kind, of_kind in of_kinds.items() if of_kind]


def _kind(kind: str, tensors: Sequence[Tensor], base: int | None) -> Kind:
    from_zero, from_base = ([t.view(origin) for t in tensors] for origin in ("zero", "base"))
    angles = [
        angle
        for tensor, view in zip(tensors, from_zero, strict=True)
        if view is not None
        for angle in view.pairs(base if tensor.origin == "base" else None)
    ]
    task_angles = [angle for view in from_base if view is not None for angle in view.pairs()]
    gaps = [tensor.linear_gap for tensor in tensors if tensor.linear_gap is not None]
    return Kind(
        kind=kind,
        tensors=len(tensors),
        angle_median=_median(angles),
        angle_largest=max(angles, default=None),
        spread_median=_median(tensor.spread for tensor in tensors),
        linear_length_median=_median(view.linear_length for view in from_zero if view),
        linear_gap_largest=max(gaps, default=None),
        not_unique=sum(not tensor.unique for tensor in tensors),
        task_angle_median=_median(task_angles),
        task_linear_length_median=_median(view.linear_length for view in from_base if view),
        task_rounding_median=_median(_largest(tensor.rounding) for tensor in tensors),
    )


def _largest(values: Vector | None) -> float | None:
    return max((value for value in values or () if value is not None), default=None)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _vector(values: Floats) -> Vector:
    return [_number(value) for value in values.tolist()]


def _matrix(values: Floats) -> Matrix:
    return [_vector(row) for row in values]
