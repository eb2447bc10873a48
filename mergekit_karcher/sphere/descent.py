"""Steps to the mean: points on R spheres as coefficients over the inputs, and moves between them.

Every iterate of the paper's Algorithm 1 is a combination of the inputs, so the Gram matrix of the
inputs is all that the mean needs. With the unit inputs p_i = W_i / |W_i|, weights w_i that sum to
one, D_ij = |p_i - p_j|^2 and an iterate x = sum_i c_i p_i of length one:

    h_i   = (Dc)_i / 2 - (sum c - 1) = 1 - cos(theta_i)       theta_i: angle from x to p_i
    alpha = sum_i w_i theta_i cot(theta_i)
    tau   = w theta / sin(theta) - alpha c                    minus half the gradient of
                                                              sum_i w_i theta_i^2

The mean is where tau, a tangent vector at x, vanishes. All of it runs on R spheres at once, which
have nothing to do with each other: the first axis of every array.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_karcher.sphere.trig import Bools, Floats, angle_terms, times
from mergekit_karcher.sphere.uniqueness import gram_rounding

_EPS = float(np.finfo(np.float64).eps)

# Backtracking accepts a rise of the objective that rounding alone can cause.
_OBJECTIVE_SLACK = 1e-14
_HALVINGS = 5
_LONGEST_STEP = 1.0  # radians

Indices = NDArray[np.intp]


class Points(NamedTuple):
    """Points x = sum_i c_i p_i, one on each of R spheres, and what the descent needs to know there.

    coefficients: c (R, N).
    versines: h (R, N).
    theta, theta_over_sin, curvature: as in `AngleTerms`, (R, N).
    alpha: (R,).
    tau: (R, N).
    residual: |tau|, (R,), radians.
    objective: sum_i w_i theta_i^2 / 2, (R,).
    valid: (R,); False where the sum is zero to rounding, and the rest arbitrary.
    """

    coefficients: Floats
    versines: Floats
    theta: Floats
    theta_over_sin: Floats
    curvature: Floats
    alpha: Floats
    tau: Floats
    residual: Floats
    objective: Floats
    valid: Bools

    def take(self, index: Indices | Bools) -> Points:
        """The points on some of the spheres, copied."""
        return Points._make(values[index] for values in self)

    def put(self, index: Indices, points: Points) -> None:
        """Replace the points on some of the spheres."""
        for values, new in zip(self, points, strict=True):
            values[index] = new

    def smallest_residual(self, tol: float) -> Floats:
        """The residual to stop at, (R,): tol, or more where rounding alone leaves more."""
        # The sum of c, and with it rounding, grows as the inputs near pi/2.
        rounding = 32 * _EPS * np.abs(self.coefficients).sum(-1)
        smallest: Floats = np.maximum(tol, rounding)
        return smallest


@dataclass(frozen=True, eq=False)
class Spheres:
    """R problems: D_ij = |p_i - p_j|^2 (R, N, N), and weights (R, N) that sum to one."""

    distances: Floats
    weights: Floats

    def __post_init__(self) -> None:
        np.maximum(self.distances, 0, out=self.distances)

    def take(self, index: Indices) -> Spheres:
        """Some of the problems."""
        if len(index) == len(self.weights):
            return self
        return Spheres(self.distances[index], self.weights[index])

    def points(self, coefficients: Floats) -> Points:
        """The points in the directions sum_i c_i p_i.

        Arguments:
            coefficients: The c_i (R, N), of any scale.
        """
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
        theta, theta_over_sin, theta_cot, curvature = angle_terms(versines)
        alpha = (self.weights * theta_cot).sum(-1)
        tau = self.weights * theta_over_sin - alpha[:, None] * coefficients
        return Points(
            coefficients,
            versines,
            theta,
            theta_over_sin,
            curvature,
            alpha,
            tau,
            self._length(tau, versines),
            (self.weights * theta**2).sum(-1) / 2,
            valid,
        )

    def descend(self, start: Points, max_iter: int, tol: float) -> tuple[Points, NDArray[np.int64]]:
        """Go from points to local minima of the objective.

        Arguments:
            start: Where to begin, overwritten.
            max_iter: The most steps on each sphere.
            tol: Radians, the residual that ends the steps.

        Returns:
            start, now the last points, and the numbers of steps taken, (R,).
        """
        points, steps = start, np.zeros(len(self.weights), np.int64)
        while True:
            active = (points.residual > points.smallest_residual(tol)) & (steps < max_iter)
            index = np.flatnonzero(active)
            if index.size == 0:
                break
            points.put(index, self.take(index).step(points.take(index)))
            steps[index] += 1
        near = (points.residual > _EPS) & (points.residual <= points.smallest_residual(tol))
        index = np.flatnonzero((points.alpha > 0) & near)
        if index.size:
            # Newton squares the error: one step past tol leaves rounding errors only.
            before, spheres = points.take(index), self.take(index)
            after = spheres._move(before, spheres._newton(before))
            better = after.valid & (after.residual < before.residual)
            points.put(index[better], after.take(better))
        return points, steps

    def step(self, points: Points) -> Points:
        """One step down from points: Newton's where it lowers the objective, else Algorithm 1's."""
        moved = points.take(np.arange(len(points.alpha)))
        waiting = np.flatnonzero(points.alpha > 0)
        slow = np.flatnonzero(~(points.alpha > 0))
        if waiting.size:
            direction = self.take(waiting)._newton(points.take(waiting))
            for _ in range(_HALVINGS):
                candidate = self.take(waiting)._move(points.take(waiting), direction)
                limit = points.objective[waiting] + _OBJECTIVE_SLACK
                good = candidate.valid & (candidate.objective <= limit)
                moved.put(waiting[good], candidate.take(good))
                waiting, direction = waiting[~good], direction[~good] / 2
                if waiting.size == 0:
                    break
            slow = np.concatenate([slow, waiting])
        if slow.size:
            # The fixed point of Algorithm 1. The Hessian of the objective is at most one on a
            # sphere, so the full step never raises it.
            candidate = self.take(slow)._move(points.take(slow), points.tau[slow])
            moved.put(slow[candidate.valid], candidate.take(candidate.valid))
        return moved

    def _newton(self, points: Points) -> Floats:
        """Newton's tangent vectors (Buss & Fillmore 2001, A2), at most one radian long."""
        h = points.versines
        bending = self.weights * points.curvature
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

    def _move(self, points: Points, tangent: Floats) -> Points:
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


def angles_to_point(distances: Floats, coefficients: Floats) -> Floats:
    """The angles from unit vectors to a combination of them.

    Arguments:
        distances: |p_i - p_j|^2, (N, N).
        coefficients: (N,), of any scale.

    Returns:
        Radians from each p_i to the direction of sum_i c_i p_i, (N,); NaN where that sum is zero to
        rounding.
    """
    points = Spheres(distances[None], np.ones((1, len(distances)))).points(coefficients[None])
    angles: Floats = points.theta[0]
    return angles if bool(points.valid[0]) else np.full_like(angles, np.nan)
