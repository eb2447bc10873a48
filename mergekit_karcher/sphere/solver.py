"""The weighted Karcher mean on the unit sphere, in coefficients over its N inputs.

Every iterate of the paper's Algorithm 1 is a combination of the inputs, so the Gram matrix of the
inputs is all that the mean needs. With the unit inputs p_i = W_i / |W_i|, weights w_i that sum to
one, D_ij = |p_i - p_j|^2 and an iterate x = sum_i c_i p_i of length one:

    h_i   = (Dc)_i / 2 - (sum c - 1) = 1 - cos(theta_i)       theta_i: angle from x to p_i
    alpha = sum_i w_i theta_i cot(theta_i)
    tau   = w theta / sin(theta) - alpha c                    minus half the gradient of
                                                              sum_i w_i theta_i^2

The mean is where tau, a tangent vector at x, vanishes. All of it runs on R spheres at once, which
have nothing to do with each other but the weights: the first axis of every array.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_karcher.sphere.hemisphere import (
    gram_rounding,
    in_open_hemisphere,
    linearly_independent,
)
from mergekit_karcher.sphere.trig import AngleTerms, Floats, angle_terms, times

_EPS = float(np.finfo(np.float64).eps)

# Backtracking accepts a rise of the objective that rounding alone can cause.
_OBJECTIVE_SLACK = 1e-14
_HALVINGS = 5
_LONGEST_STEP = 1.0  # radians

# An angle counts as smaller than pi/2 if 1 - cos(angle) is smaller than one by this much.
_RIGHT_ANGLE_MARGIN = 1e-9

Bools = NDArray[np.bool_]
Indices = NDArray[np.intp]


class Status(enum.Enum):
    """How the mean was found; the value is the sentence for a person, with the remedy."""

    CONVERGED = "converged"
    NOT_CONVERGED = "did not converge within max_iter steps; raise max_iter"
    NOT_UNIQUE = (
        "the inputs do not lie in one open hemisphere, which a mean needs to be certainly unique; "
        "the weighted linear mean, unrescaled, was returned; leave an input out to change that"
    )
    ZERO = "no input with a weight has any length; the weighted linear mean was returned"


class Magnitude(enum.Enum):
    """The length of the mean, from weights w_i that sum to one and the norms n_i = |W_i|."""

    ARITHMETIC = "arithmetic"  # sum_i w_i n_i (paper, equation 6)
    GEOMETRIC = "geometric"  # prod_i n_i^(w_i); zero as soon as one input is
    LINEAR = "linear"  # |sum_i w_i W_i|


@dataclass(frozen=True, eq=False)
class SphereMeans:
    """The means on R spheres of N inputs each, W = sum_i coefficients_i W_i.

    coefficients: (R, N) float64; zero for an input without direction, unless none has one.
    angles: (R, N) float64, radians from each input to the mean; NaN where either has no direction.
        Computed from a Gram matrix: below 1e-7 rad only the order of magnitude is meaningful.
    iterations: (R,) steps taken, over the start that won.
    residuals: (R,) radians, the tangent step that remains; NaN for a fall-back.
    unique: (R,) whether the inputs were proven to have one mean, to which the steps lead.
    statuses: (R,) of Status.
    """

    coefficients: Floats
    angles: Floats
    iterations: NDArray[np.int64]
    residuals: Floats
    unique: Bools
    statuses: NDArray[Any]


def normalised(weights: Floats) -> Floats:
    """Weights (..., N) scaled to sum to one; dividing by the largest first keeps the sum finite."""
    shares: Floats = weights / weights.max(-1, keepdims=True)
    normal: Floats = shares / shares.sum(-1, keepdims=True)
    return normal


def unit_grams(grams: Floats) -> tuple[Floats, Floats]:
    """Norms (R, N) and the Gram matrices (R, N, N) of the unit inputs.

    An input of norm zero becomes a unit vector at right angles to all others: with a weight of
    zero it takes no part in anything.
    """
    norms = np.sqrt(np.maximum(np.diagonal(grams, axis1=1, axis2=2), 0))
    lengths = np.where(norms > 0, norms, 1)
    unit = grams / lengths[:, :, None] / lengths[:, None, :]
    diagonal = np.arange(grams.shape[-1])
    unit[:, diagonal, diagonal] = 1
    return norms, unit


def magnitude_ratios(magnitude: Magnitude, shares: Floats, norms: Floats, unit: Floats) -> Floats:
    """The length of the mean over each input's norm, (R, N); zero for inputs of norm zero.

    shares (N,) sum to one; norms (R, N); unit (R, N, N), the Gram matrices of the unit inputs.
    """
    lengths = np.where(norms > 0, norms, 1)
    if magnitude is Magnitude.GEOMETRIC:
        logarithms = np.log(lengths)
        ratios = np.exp((logarithms @ shares)[:, None] - logarithms)
        return np.where((norms > 0).all(-1, keepdims=True), ratios, 0)
    if magnitude is Magnitude.LINEAR:
        largest = norms.max(-1, keepdims=True)
        parts = shares * (norms / np.where(largest > 0, largest, 1))
        squared = np.maximum((parts * times(unit, parts)).sum(-1, keepdims=True), 0)
        return np.where(norms > 0, np.sqrt(squared) * (largest / lengths), 0)
    return np.where(norms > 0, (norms @ shares)[:, None] / lengths, 0)


def solve_means(
    grams: Floats,
    weights: Floats,
    exponents: NDArray[np.int64],
    *,
    magnitude: Magnitude,
    max_iter: int,
    tol: float,
) -> SphereMeans:
    """The Karcher means of N inputs on each of R spheres, from their inner products.

    grams: (R, N, N), grams_rij = <W_ri, W_rj> 2^-(exponents_ri + exponents_rj). In long double,
        where the platform's is wider than float64, the coefficients keep float64's digits up to
        pi/2, where the mean amplifies errors of the Gram matrix by 1 / cos^2 of the angles.
    weights: (N,) positive and finite, of any sum.
    exponents: (R, N) integers that keep the squares of very large or small inputs representable.
    max_iter: at most that many steps a start. tol: radians, the longest step that may remain.

    The direction is the minimiser of sum_i w_i angle(x, W_i)^2 (paper, equation 9) over the inputs
    that have one; the magnitude counts zero inputs too.
    """
    shares = normalised(weights)
    rows, count = grams.shape[:2]
    scaled_norms, unit = unit_grams(grams)
    directed = scaled_norms > 0
    live = directed.any(-1)
    means = SphereMeans(
        np.zeros((rows, count)),
        np.full((rows, count), np.nan),
        np.zeros(rows, np.int64),
        np.zeros(rows),
        np.ones(rows, bool),
        np.full(rows, Status.CONVERGED, dtype=object),
    )
    # Zeros in a metric may hold values that the metric does not see.
    means.coefficients[~live] = shares
    means.statuses[~live] = Status.ZERO
    index = np.flatnonzero(live)
    if index.size == 0:
        return means
    directed, unit = directed[index], unit[index]
    norms = np.ldexp(scaled_norms[index], exponents[index])
    sphere = _Spheres(2 - 2 * unit, normalised(np.where(directed, shares, 0)))
    best = sphere.points(sphere.weights)

    proven = best.valid & (best.versines < 1 - _RIGHT_ANGLE_MARGIN).all(-1, where=directed)
    doubtful = np.flatnonzero(~proven)
    if doubtful.size:
        proven[doubtful] = linearly_independent(unit[doubtful])
    solvable = proven.copy()
    doubtful = np.flatnonzero(~proven)
    if doubtful.size:
        solvable[doubtful] = in_open_hemisphere(unit[doubtful])

    steps = np.zeros(len(index), np.int64)
    started = np.flatnonzero(solvable & best.valid)
    _put(best, started, *sphere.take(started).descend(best.take(started), max_iter, tol), steps)
    again = np.flatnonzero(solvable & ~(proven & best.valid & (best.alpha > 0)))
    for start in range(count) if again.size else ():
        some = again[directed[again, start]]
        first = sphere.take(some).points(np.eye(count)[[start] * len(some)])
        other, taken = sphere.take(some).descend(first, max_iter, tol)
        better = ~best.valid[some] | (other.objective < best.objective[some])
        _put(best, some[better], other.take(better), taken[better], steps)

    converged = solvable & (best.residual <= np.maximum(tol, best.rounding))
    # At the mean itself tau = 0 gives the coefficients again, and well defined ones where
    # dependent inputs leave c open.
    closed = converged & (best.alpha > 0)
    alpha = np.where(closed, best.alpha, 1)[:, None]
    found = np.where(
        closed[:, None], sphere.weights * best.terms.stretch / alpha, best.coefficients
    )
    coefficients = found * magnitude_ratios(magnitude, shares, norms, unit)

    lost = np.flatnonzero(~solvable)
    if lost.size:
        ratios = norms[lost] / norms[lost].max(-1, keepdims=True)
        at_linear = sphere.take(lost).points(sphere.weights[lost] * ratios)
        coefficients[lost] = shares
        best.terms.theta[lost] = np.where(at_linear.valid[:, None], at_linear.terms.theta, np.nan)
    means.coefficients[index] = coefficients
    means.angles[index] = np.where(directed, best.terms.theta, np.nan)
    means.iterations[index] = steps
    means.residuals[index] = np.where(solvable, best.residual, np.nan)
    means.unique[index] = solvable & (best.alpha > 0)
    means.statuses[index[solvable & ~converged]] = Status.NOT_CONVERGED
    means.statuses[index[lost]] = Status.NOT_UNIQUE
    return means


def angles_to_point(distances: Floats, coefficients: Floats) -> Floats:
    """Radians from each of N unit vectors to the direction of sum c_i p_i, (N,).

    distances: (N, N), |p_i - p_j|^2. NaN where that sum is zero to rounding.
    """
    points = _Spheres(distances[None], np.ones((1, len(distances)))).points(coefficients[None])
    angles: Floats = points.terms.theta[0]
    return angles if bool(points.valid[0]) else np.full_like(angles, np.nan)


@dataclass(frozen=True, eq=False)
class _Points:
    """Points x = sum_i c_i p_i, one on each sphere, and what the descent needs to know there."""

    coefficients: Floats  # (R, N)
    versines: Floats  # (R, N)
    terms: AngleTerms  # each (R, N)
    alpha: Floats  # (R,)
    tau: Floats  # (R, N)
    residual: Floats  # (R,)
    objective: Floats  # (R,)
    valid: Bools  # (R,) False where the sum is zero to rounding; the rest is then arbitrary

    @property
    def rounding(self) -> Floats:
        """The residual that rounding alone leaves; sum c grows as the inputs near pi/2."""
        left: Floats = 32 * _EPS * np.abs(self.coefficients).sum(-1)
        return left

    def take(self, index: Indices | Bools) -> _Points:
        """Those at some of the spheres."""
        return _Points(*(_taken(getattr(self, field.name), index) for field in fields(self)))


def _taken(value: Any, index: Indices | Bools) -> Any:
    if isinstance(value, AngleTerms):
        return AngleTerms(*(part[index] for part in value))
    return value[index]


def _put(
    points: _Points, index: Indices, new: _Points, taken: NDArray[np.int64] | None, steps: Any
) -> None:
    """Write new points over those at some of the spheres, and the number of steps to them."""
    for field in fields(points):
        old, value = getattr(points, field.name), getattr(new, field.name)
        pairs = zip(old, value, strict=True) if isinstance(old, AngleTerms) else [(old, value)]
        for target, source in pairs:
            target[index] = source
    if taken is not None:
        steps[index] = taken


@dataclass(frozen=True, eq=False)
class _Spheres:
    """R problems: D_ij = |p_i - p_j|^2 (R, N, N), and weights (R, N) that sum to one."""

    distances: Floats
    weights: Floats

    def __post_init__(self) -> None:
        np.maximum(self.distances, 0, out=self.distances)

    def take(self, index: Indices) -> _Spheres:
        """Some of the problems."""
        if len(index) == len(self.weights):
            return self
        return _Spheres(self.distances[index], self.weights[index])

    def points(self, coefficients: Floats) -> _Points:
        """The points in the directions sum_i c_i p_i."""
        total = coefficients.sum(-1)
        spread = times(self.distances, coefficients)
        squared = total * total - (coefficients * spread).sum(-1) / 2
        floor = gram_rounding(coefficients.shape[-1]) * np.abs(coefficients).sum(-1) ** 2
        valid = squared > floor
        scale = 1 / np.sqrt(np.where(valid, squared, 1))
        coefficients, spread = coefficients * scale[:, None], spread * scale[:, None]
        total = total * scale
        # |x| = 1 gives (total - 1)(total + 1) = c'Dc/2, which does not cancel.
        excess = (coefficients * spread).sum(-1) / 2 / np.where(total > 0, 1 + total, 1)
        excess = np.where(total > 0, excess, total - 1)
        versines = np.clip(spread / 2 - excess[:, None], 0, 2)
        terms = angle_terms(versines)
        alpha = (self.weights * terms.cotangent).sum(-1)
        tau = self.weights * terms.stretch - alpha[:, None] * coefficients
        return _Points(
            coefficients,
            versines,
            terms,
            alpha,
            tau,
            self._length(tau, versines),
            (self.weights * terms.theta**2).sum(-1) / 2,
            valid,
        )

    def descend(
        self, start: _Points, max_iter: int, tol: float
    ) -> tuple[_Points, NDArray[np.int64]]:
        """From start to minima: the last points, and the numbers of steps taken."""
        points, steps = start, np.zeros(len(self.weights), np.int64)
        while True:
            active = (points.residual > np.maximum(tol, points.rounding)) & (steps < max_iter)
            index = np.flatnonzero(active)
            if index.size == 0:
                break
            moved = self.take(index)._step(points.take(index))
            _put(points, index, moved, None, steps)
            steps[index] += 1
        near = (points.residual > _EPS) & (points.residual <= np.maximum(tol, points.rounding))
        index = np.flatnonzero((points.alpha > 0) & near)
        if index.size:
            # Newton squares the error: one step past tol leaves rounding errors only.
            some, sphere = points.take(index), self.take(index)
            beyond = sphere._move(some, sphere._newton(some))
            better = beyond.valid & (beyond.residual < some.residual)
            _put(points, index[better], beyond.take(better), None, steps)
        return points, steps

    def _step(self, points: _Points) -> _Points:
        moved = points.take(np.arange(len(points.alpha)))
        waiting = np.flatnonzero(points.alpha > 0)
        slow = np.flatnonzero(~(points.alpha > 0))
        if waiting.size:
            direction = self.take(waiting)._newton(points.take(waiting))
            for _ in range(_HALVINGS):
                candidate = self.take(waiting)._move(points.take(waiting), direction)
                limit = points.objective[waiting] + _OBJECTIVE_SLACK
                good = candidate.valid & (candidate.objective <= limit)
                _put(moved, waiting[good], candidate.take(good), None, None)
                waiting, direction = waiting[~good], direction[~good] / 2
                if waiting.size == 0:
                    break
            slow = np.concatenate([slow, waiting])
        if slow.size:
            # The fixed point of Algorithm 1. The Hessian of the objective is at most one on a
            # sphere, so the full step never raises it.
            candidate = self.take(slow)._move(points.take(slow), points.tau[slow])
            good = candidate.valid
            _put(moved, slow[good], candidate.take(good), None, None)
        return moved

    def _newton(self, points: _Points) -> Floats:
        """Newton's tangent vectors (Buss & Fillmore 2001, A2), at most one radian long."""
        h = points.versines
        bending = self.weights * points.terms.curvature
        # L_ij = <p_i, p_j> - cos_i cos_j, the products of the tangential parts of the inputs.
        products = h[:, :, None] + h[:, None, :] - h[:, :, None] * h[:, None, :]
        products -= self.distances / 2
        matrix = bending[:, :, None] * products
        diagonal = np.arange(h.shape[-1])
        matrix[:, diagonal, diagonal] += points.alpha[:, None]
        solution = np.linalg.solve(
            matrix.astype(np.float64), points.tau.astype(np.float64)[:, :, None]
        )[:, :, 0]
        along = (solution * (1 - h)).sum(-1)
        direction = solution - along[:, None] * points.coefficients
        length = self._length(direction, h)
        shrink = np.minimum(1, _LONGEST_STEP / np.where(length > 0, length, 1))
        scaled: Floats = direction * shrink[:, None]
        return scaled

    def _move(self, points: _Points, tangent: Floats) -> _Points:
        """Along the geodesics that leave the points with those tangent vectors."""
        length = self._length(tangent, points.versines)[:, None]
        return self.points(np.cos(length) * points.coefficients + np.sinc(length / np.pi) * tangent)

    def _length(self, tangent: Floats, versines: Floats) -> Floats:
        """sqrt(t' L t), with L_ij = h_i + h_j - h_i h_j - D_ij / 2."""
        along = (tangent * versines).sum(-1)
        squared = 2 * along * tangent.sum(-1) - along * along
        squared = squared - (tangent * times(self.distances, tangent)).sum(-1) / 2
        length: Floats = np.sqrt(np.maximum(squared, 0))
        return length
