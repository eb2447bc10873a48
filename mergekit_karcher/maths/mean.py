"""The weighted Karcher mean on the unit sphere, in coefficients over its N inputs.

Every iterate of the paper's Algorithm 1 is a combination of the inputs, so the Gram matrix of the
inputs is all that the mean needs. With the unit inputs p_i = W_i / |W_i|, weights w_i that sum to
one, D_ij = |p_i - p_j|^2 and an iterate x = sum_i c_i p_i of length one:

    h_i   = (Dc)_i / 2 - (sum c - 1) = 1 - cos(theta_i)       theta_i: angle from x to p_i
    alpha = sum_i w_i theta_i cot(theta_i)
    tau   = w theta / sin(theta) - alpha c                    minus half the gradient of
                                                              sum_i w_i theta_i^2

The mean is where tau, a tangent vector at x, vanishes.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from mergekit_karcher.maths.geometry import AngleTerms, Floats, angle_terms

_EPS = float(np.finfo(np.float64).eps)

# Backtracking accepts a rise of the objective that rounding alone can cause.
_OBJECTIVE_SLACK = 1e-14
_HALVINGS = 5
_LONGEST_STEP = 1.0  # radians

# An angle counts as smaller than pi/2 if 1 - cos(angle) is smaller than one by this much.
_RIGHT_ANGLE_MARGIN = 1e-9


class Status(enum.Enum):
    """How the mean was found; the value is the sentence for a person, with the remedy."""

    CONVERGED = "converged"
    NOT_CONVERGED = "did not converge within max_iter steps; raise max_iter"
    NOT_UNIQUE = (
        "the inputs do not lie in one open hemisphere, which a mean needs to be certainly unique; "
        "the weighted linear mean, unrescaled, was returned; leave an input out to change that"
    )
    ZERO = "all inputs with a weight are zero, and so is their mean"


@dataclass(frozen=True, eq=False)
class KarcherMean:
    """The mean W = sum_i coefficients_i W_i of N inputs, and what is known of it.

    coefficients: (N,) float64; zero for an input without weight or without direction.
    angles: (N,) float64, radians from each input to the result; NaN where either has no direction
        or the input has no weight. Computed from a Gram matrix: below 1e-7 rad only the order of
        magnitude is meaningful.
    iterations: steps taken, over the start that won.
    residual: length in radians of the tangent step that remains at the result; NaN for a fall-back.
    unique: whether the inputs were proven to have one mean, to which the steps lead from here.
    status: how it ended; `status.value` is a sentence that names the remedy.
    """

    coefficients: Floats
    angles: Floats
    iterations: int
    residual: float
    unique: bool
    status: Status

    @property
    def converged(self) -> bool:
        """Whether the coefficients are those of a Karcher mean, to within the tolerance."""
        return self.status in (Status.CONVERGED, Status.ZERO)


def normalised(weights: Floats) -> Floats:
    """Weights scaled to sum to one; dividing by the largest first keeps the sum finite."""
    shares: Floats = weights / weights.max()
    normal: Floats = shares / shares.sum()
    return normal


def unit_gram(gram: Floats) -> tuple[Floats, Floats]:
    """Norms (N,) and the Gram matrix (N, N) of the unit inputs; every norm must be positive."""
    norms = np.sqrt(np.diagonal(gram))
    unit = gram / np.outer(norms, norms)
    np.fill_diagonal(unit, 1.0)
    return norms, unit


def mean_of_gram(
    gram: Floats, weights: Floats, exponents: NDArray[np.int64], *, max_iter: int, tol: float
) -> KarcherMean:
    """The Karcher mean of N inputs from their inner products, with magnitude sum_i w_i |W_i|.

    gram: (N, N), gram_ij = <W_i, W_j> 2^-(exponents_i + exponents_j). In long double, where the
        platform's is wider than float64, the coefficients keep float64's digits up to pi/2, where
        the mean amplifies errors of the Gram matrix by 1 / cos^2 of the angles.
    weights: (N,) positive and finite, of any sum.
    exponents: (N,) integers that keep the squares of very large or small inputs representable.
    max_iter: at most that many steps a start. tol: radians, see `KarcherMean.residual`.

    The direction is the minimiser of sum_i w_i angle(x, W_i)^2 (paper, equation 9) over the inputs
    that have one, the magnitude counts zero inputs too (paper, equation 6).
    """
    shares = normalised(weights)
    count = len(shares)
    directed = np.flatnonzero(np.diagonal(gram) > 0)
    coefficients = np.zeros(count)
    angles = np.full(count, np.nan)
    if directed.size == 0:
        return KarcherMean(coefficients, angles, 0, 0.0, True, Status.ZERO)

    scaled_norms, unit = unit_gram(gram[np.ix_(directed, directed)])
    norms = np.ldexp(scaled_norms, exponents[directed])
    sphere = _Sphere(unit, normalised(shares[directed]))
    linear = sphere.point(sphere.weights)

    proven = linearly_independent(unit) or (linear is not None and linear.within_right_angle)
    if not proven and not in_open_hemisphere(unit):
        at_linear = sphere.point(sphere.weights * (norms / norms.max()))
        if at_linear is not None:
            angles[directed] = at_linear.terms.theta
        return KarcherMean(shares, angles, 0, float("nan"), False, Status.NOT_UNIQUE)

    best, iterations = sphere.descend(linear, max_iter, tol) if linear is not None else (None, 0)
    if best is None or not proven or best.alpha <= 0:
        for start in np.eye(len(directed)):
            first = sphere.point(start)
            assert first is not None  # a single unit input always is a point
            other, steps = sphere.descend(first, max_iter, tol)
            if best is None or other.objective < best.objective:
                best, iterations = other, steps
    assert best is not None

    converged = best.residual <= max(tol, best.rounding)
    unit_coefficients = best.coefficients
    if converged and best.alpha > 0:
        # At the mean itself tau = 0 gives the coefficients again, and well defined ones where
        # dependent inputs leave c open.
        unit_coefficients = sphere.weights * best.terms.stretch / best.alpha
    magnitude_ratios = (shares[directed] @ norms) / norms
    coefficients[directed] = magnitude_ratios * unit_coefficients
    angles[directed] = best.terms.theta
    return KarcherMean(
        coefficients,
        angles,
        iterations,
        best.residual,
        bool(best.alpha > 0),
        Status.CONVERGED if converged else Status.NOT_CONVERGED,
    )


def linearly_independent(unit: Floats) -> bool:
    """Whether unit inputs are independent, so that they lie in an open hemisphere.

    By Weyl's inequality the smallest eigenvalue is off by no more than the Gram matrix is.
    """
    return bool(np.linalg.eigvalsh(unit.astype(np.float64))[0] > _gram_rounding(len(unit)))


def in_open_hemisphere(unit: Floats) -> bool:
    """Whether some y has <p_i, y> > 0 for all i; the mean is unique then (Buss & Fillmore 2001).

    That is so exactly if zero is not in the convex hull of the inputs. The squared distance d^2
    of the hull from zero comes from a non-negative least squares problem (Lawson & Hanson's LDP):
    min |P l|^2 + (1 - sum l)^2 over l >= 0 is d^2 / (1 + d^2).
    """
    eigenvalues, vectors = np.linalg.eigh(unit.astype(np.float64))
    root = np.sqrt(np.maximum(eigenvalues, 0))[:, None] * vectors.T
    count = len(unit)
    system = np.vstack([root, np.ones(count)])
    try:
        _, residual = nnls(system, np.append(np.zeros(count), 1.0), maxiter=100 * count)
    except RuntimeError:  # it gave up: nothing is proven
        return False
    return bool(residual * residual > _gram_rounding(count))


def _gram_rounding(count: int) -> float:
    """A bound on the spectral norm of the rounding errors in a unit Gram matrix."""
    return 64 * count * _EPS


@dataclass(frozen=True, eq=False)
class _Point:
    """A point x = sum_i c_i p_i of the unit sphere and what the descent needs to know there."""

    coefficients: Floats
    versines: Floats
    terms: AngleTerms
    alpha: float
    tau: Floats
    products: Floats  # of the tangential parts of the inputs: L_ij = <p_i, p_j> - cos_i cos_j
    residual: float
    objective: float

    @property
    def within_right_angle(self) -> bool:
        """Whether every input is less than pi/2 away: uniqueness by Afsari 2011."""
        return bool(self.versines.max() < 1 - _RIGHT_ANGLE_MARGIN)

    @property
    def rounding(self) -> float:
        """The residual that rounding alone leaves; sum c grows as the inputs near pi/2."""
        return float(32 * _EPS * np.abs(self.coefficients).sum())


@dataclass(frozen=True, eq=False)
class _Sphere:
    """The problem: unit inputs by their Gram matrix, and weights that sum to one."""

    unit: Floats
    weights: Floats

    def point(self, coefficients: Floats) -> _Point | None:
        """The point in direction sum_i c_i p_i; None where that sum is zero to rounding."""
        distances = np.maximum(2 - 2 * self.unit, 0)
        total = coefficients.sum()
        spread = distances @ coefficients
        squared = total * total - coefficients @ spread / 2
        if not squared > _gram_rounding(len(coefficients)) * np.abs(coefficients).sum() ** 2:
            return None
        scale = 1 / np.sqrt(squared)
        coefficients, total, spread = coefficients * scale, total * scale, spread * scale
        # |x| = 1 gives (total - 1)(total + 1) = c'Dc/2, which does not cancel.
        excess = coefficients @ spread / 2 / (1 + total) if total > 0 else total - 1
        versines = np.clip(spread / 2 - excess, 0, 2)
        terms = angle_terms(versines)
        alpha = float(self.weights @ terms.cotangent)
        tau = self.weights * terms.stretch - alpha * coefficients
        products = versines[:, None] + versines - np.outer(versines, versines) - distances / 2
        return _Point(
            coefficients,
            versines,
            terms,
            alpha,
            tau,
            products,
            _length(tau, products),
            float(self.weights @ terms.theta**2) / 2,
        )

    def descend(self, start: _Point, max_iter: int, tol: float) -> tuple[_Point, int]:
        """From start to a minimum: the last point, and the number of steps taken."""
        point, steps = start, 0
        while point.residual > max(tol, point.rounding) and steps < max_iter:
            point = self._step(point)
            steps += 1
        if point.alpha > 0 and _EPS < point.residual <= max(tol, point.rounding):
            # Newton squares the error: one step past tol leaves rounding errors only.
            beyond = self._move(point, self._newton(point))
            if beyond is not None and beyond.residual < point.residual:
                point = beyond
        return point, steps

    def _step(self, point: _Point) -> _Point:
        if point.alpha > 0:
            direction = self._newton(point)
            for _ in range(_HALVINGS):
                candidate = self._move(point, direction)
                if (
                    candidate is not None
                    and candidate.objective <= point.objective + _OBJECTIVE_SLACK
                ):
                    return candidate
                direction = direction / 2
        # The fixed point of Algorithm 1. The Hessian of the objective is at most one on a sphere,
        # so the full step never raises it.
        return self._move(point, point.tau) or point

    def _newton(self, point: _Point) -> Floats:
        """Newton's tangent vector (Buss & Fillmore 2001, A2), at most one radian long."""
        bending = self.weights * point.terms.curvature
        matrix = point.alpha * np.eye(len(bending)) + bending[:, None] * point.products
        direction = np.linalg.solve(matrix.astype(np.float64), point.tau.astype(np.float64))
        direction = direction - (direction @ (1 - point.versines)) * point.coefficients
        length = _length(direction, point.products)
        return direction * min(1.0, _LONGEST_STEP / length) if length > 0 else direction

    def _move(self, point: _Point, tangent: Floats) -> _Point | None:
        """Along the geodesic that leaves point with that tangent vector."""
        length = _length(tangent, point.products)
        return self.point(np.cos(length) * point.coefficients + np.sinc(length / np.pi) * tangent)


def _length(tangent: Floats, products: Floats) -> float:
    return math.sqrt(max(float(tangent @ products @ tangent), 0.0))
