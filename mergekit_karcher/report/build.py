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
from mergekit_karcher.sphere.solver import normalised
from mergekit_karcher.sphere.trig import Floats


class Planned(NamedTuple):
    """What the plan of a merge says about the report on it.

    models: by the name that observations have, in the order of the config. granularities: by
    output tensor, in the order of the plan; tied duplicates of another are left out.
    roundoff: the largest relative rounding error of the output's dtype; None for that of the files.
    """

    settings: Settings
    models: Mapping[str, Model]
    base: str | None
    granularities: Mapping[str, str]
    roundoff: float | None


def build(
    planned: Planned, observations: Mapping[str, Observation], means: Mapping[str, KarcherMean]
) -> Report:
    """The report on a merge, of all its tensors that were observed; buffers are not.

    means: over the observed inputs of each tensor.
    """
    models = list(planned.models)
    seen = {
        name: observations[name].among(models)
        for name in planned.granularities
        if name in observations
    }
    if not seen:
        raise KarcherError(
            "There is nothing to report on: no tensor of floating-point numbers is merged from "
            "this config."
        )
    tensors = [
        _tensor(planned, own, means[name], planned.granularities[name])
        for name, own in seen.items()
    ]
    whole = joined([own.zero for own in seen.values()])
    base = models.index(planned.base) if planned.base in models else None
    tasks = None if base is None else _whole_view("base", as_seen_from(whole, base), seen.values())
    rounding = None
    if tasks is not None and tasks.pairs():
        noise = np.sqrt(np.nansum([_noise(own) ** 2 for own in seen.values()], 0))
        rounding = _vector(noise / np.array([n or np.nan for n in tasks.norms], dtype=float))
    report = Report(
        schema=SCHEMA,
        version=__version__,
        settings=planned.settings,
        models=list(planned.models.values()),
        whole=_whole_view("zero", whole, seen.values()),
        whole_tasks=tasks if rounding is not None else None,
        whole_rounding=rounding,
        verdict="",
        kinds=_kinds(tensors, base),
        tensors=tensors,
    )
    return report.model_copy(update={"verdict": verdict_of(report)})


def _tensor(planned: Planned, seen: Observation, mean: KarcherMean, granularity: str) -> Tensor:
    sphere = seen.sphere
    inputs = np.isfinite(seen.weights)
    shares = _shares(seen.weights)
    coefficients = None
    angles = np.full(len(inputs), np.nan)
    gap = float("nan")
    if granularity == "row":
        angles[inputs] = mean.angles
    else:
        coefficients = np.full(len(inputs), np.nan)
        coefficients[inputs] = mean.coefficients
        known = np.nan_to_num(coefficients)
        angles = np.where(inputs, sphere.angles_to(known), np.nan)
        # What the files do not hold is not told apart either.
        roundoff = max(planned.roundoff or 0.0, float(np.nanmin(seen.roundoffs)))
        rounding = roundoff * RMS_ROUNDING * _length(seen.zero, shares)
        gap = sphere.gap(known, shares) * _length(sphere, shares) / (rounding or float("nan"))
    directed = np.isfinite(angles)
    spread = np.sqrt(shares[directed] @ angles[directed] ** 2 / (shares[directed].sum() or 1))
    own = _view(seen.origin, sphere, seen.weights)
    other = None
    if seen.base is not None:
        origin, away = ("zero", seen.zero) if seen.origin == "base" else ("base", seen.base)
        other = _view(origin, away, seen.weights)
    return Tensor(
        name=seen.name,
        shape=list(seen.shape),
        kind=kind_of(seen.name),
        layer=layer_of(seen.name),
        origin=seen.origin,
        granularity=granularity,
        norms=own.norms,
        angles=own.angles,
        linear_length=own.linear_length,
        coefficients=None if coefficients is None else _vector(coefficients),
        angles_to_mean=_vector(angles),
        spread=_number(spread) if directed.any() else None,
        unique=mean.unique,
        status=mean.status.name.lower(),
        linear_gap=_number(gap),
        other=other,
        rounding=_rounding(seen),
    )


def _rounding(seen: Observation) -> Vector | None:
    if seen.base is None:
        return None
    lengths = np.where(seen.base.norms > 0, seen.base.norms, np.nan)
    return _vector(_noise(seen) / lengths)


def _noise(seen: Observation) -> Floats:
    """The length of what rounding may have changed in each model, (N,)."""
    noise: Floats = RMS_ROUNDING * seen.roundoffs * seen.zero.norms
    return noise


def _whole_view(origin: str, whole: PairwiseGeometry, seen: Iterable[Observation]) -> View:
    """All tensors as one vector; weights may differ from one to the other."""
    parts = []
    for own in seen:
        sphere = own.zero if origin == "zero" else own.base
        if sphere is not None:
            shares = _shares(own.weights)
            mean = _length(sphere, shares)
            kept = sphere.linear_length(shares)
            if mean > 0 and np.isfinite(kept):
                parts.append((shares, mean, kept))
    if not parts:
        length = float("nan")
    elif all(np.array_equal(shares, parts[0][0]) for shares, *_ in parts):
        length = whole.linear_length(parts[0][0])
    else:
        means = np.array([mean for _, mean, _ in parts])
        merged = means * np.array([kept for *_, kept in parts])
        length = float(np.linalg.norm(merged) / np.linalg.norm(means))
    return View(
        origin=origin,
        norms=_vector(whole.norms),
        angles=_matrix(whole.angles),
        linear_length=_number(length),
    )


def _view(origin: str, sphere: PairwiseGeometry, weights: Floats) -> View:
    return View(
        origin=origin,
        norms=_vector(sphere.norms),
        angles=_matrix(sphere.angles),
        linear_length=_number(sphere.linear_length(_shares(weights))),
    )


def _length(sphere: PairwiseGeometry, shares: Floats) -> float:
    """The weighted mean of the norms of those that are there."""
    there = np.isfinite(sphere.norms) & (shares > 0)
    return float(normalised(shares[there]) @ sphere.norms[there]) if there.any() else 0.0


def _shares(weights: Floats) -> Floats:
    """Weights that sum to one; zero for what takes no part."""
    shares: Floats = normalised(np.nan_to_num(weights))
    return shares


def _kinds(tensors: Sequence[Tensor], base: int | None) -> list[Kind]:
    result = []
    for kind in ORDER:
        own = [tensor for tensor in tensors if tensor.kind == kind]
        if own:
            result.append(_kind(kind, own, base))
    return result


def _kind(kind: str, tensors: Sequence[Tensor], base: int | None) -> Kind:
    zero, tasks = ([t.view(origin) for t in tensors] for origin in ("zero", "base"))
    angles = [
        angle
        for tensor, view in zip(tensors, zero, strict=True)
        if view is not None
        for angle in view.pairs(base if tensor.origin == "base" else None)
    ]
    task_angles = [angle for view in tasks if view is not None for angle in view.pairs()]
    gaps = [tensor.linear_gap for tensor in tensors if tensor.linear_gap is not None]
    return Kind(
        kind=kind,
        tensors=len(tensors),
        angle_median=_median(angles),
        angle_largest=max(angles, default=None),
        spread_median=_median([tensor.spread for tensor in tensors]),
        linear_length_median=_median([view.linear_length for view in zero if view]),
        linear_gap_largest=max(gaps, default=None),
        not_unique=sum(not tensor.unique for tensor in tensors),
        task_angle_median=_median(task_angles),
        task_linear_length_median=_median([view.linear_length for view in tasks if view]),
        task_rounding_median=_median([_largest(tensor.rounding) for tensor in tensors]),
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
