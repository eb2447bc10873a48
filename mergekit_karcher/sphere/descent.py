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

    (R, N) where not said otherwise.
    """

    coefficients: Floats  # c
    versines: Floats  # h
    theta: Floats  # this and the next two as in `AngleTerms`
    theta_over_sin: Floats
    curvature: Floats
    alpha: Floats  # (R,)
    tau: Floats
    residual: Floats  # |tau|, (R,), radians
    objective: Floats  # sum_i w_i theta_i^2 / 2, (R,)
    valid: Bools  # (R,); False where the sum is zero to rounding, and the rest arbitrary

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
        """The points in the directions sum_i c_i p_i, from the c_i (R, N), of any scale."""
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
        residual, objective = self._length(tau, versines), (self.weights * theta**2).sum(-1) / 2
        angles = (theta, theta_over_sin, curvature)
        return Points(coefficients, versines, *angles, alpha, tau, residual, objective, valid)

    def angles_to(self, coefficients: Floats) -> Floats:
        """Radians from the inputs to sum_i c_i p_i, (R, N); NaN where that is zero to rounding."""
        points = self.points(coefficients)
        return np.where(points.valid[:, None], points.theta, np.nan)

    def descend(self, points: Points, max_iter: int, tol: float) -> NDArray[np.int64]:
        """Overwrite points with local minima of the objective; returns the steps taken, (R,).

        tol: radians, the residual that ends the steps; max_iter: the most steps on each sphere.
        """
        steps = np.zeros(len(self.weights), np.int64)
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
        return steps

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
        # L_ij = <p_i, p_j> - cos_i cos_j, the products of the tangential parts of the inputs.
        products = h[:, :, None] + h[:, None, :] - h[:, :, None] * h[:, None, :]
        products -= self.distances / 2
        matrix = (self.weights * points.curvature)[:, :, None] * products
        diagonal = np.arange(h.shape[-1])
        matrix[:, diagonal, diagonal] += points.alpha[:, None]
        tau = points.tau.astype(np.float64)
        solution = np.linalg.solve(matrix.astype(np.float64), tau[:, :, None])[:, :, 0]
        along = (solution * (1 - h)).sum(-1)
        direction: Floats = solution - along[:, None] * points.coefficients
        length = self._length(direction, h)
        direction *= np.minimum(1, _LONGEST_STEP / np.where(length > 0, length, 1))[:, None]
        return direction

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
