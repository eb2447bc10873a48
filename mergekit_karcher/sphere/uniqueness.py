"""The uniqueness certificate: unit inputs in one open hemisphere have one mean.

Buss & Fillmore 2001, theorem 1. The inputs are given by their Gram matrix, so a certificate that
rounding errors in that matrix could have made is not one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergekit_karcher.sphere.trig import Bools, Floats, times

_EPS = float(np.finfo(np.float64).eps)

# An angle counts as smaller than pi/2 if 1 - cos(angle) is smaller than one by this much.
_RIGHT_ANGLE_MARGIN = 1e-9


def gram_rounding(count: int) -> float:
    """A bound on the spectral norm of the rounding errors in a unit Gram matrix (count, count)."""
    return 64 * count * _EPS


def near_a_pole(versines: Floats, directed: Bools) -> Bools:
    """(R,): whether all inputs are nearer than pi/2 to one point, the pole of an open hemisphere.

    versines (R, N): 1 - cos of the angle from each input to it. directed: which inputs count.
    """
    near = (versines < 1 - _RIGHT_ANGLE_MARGIN) | ~directed
    return np.asarray(near.all(-1))


def linearly_independent(unit: Floats) -> Bools:
    """(R,): whether unit inputs are linearly independent, so that they lie in an open hemisphere.

    unit: their Gram matrices, (R, N, N). By Weyl's inequality the smallest eigenvalue is off by no
    more than those are.
    """
    smallest = np.linalg.eigvalsh(unit.astype(np.float64))[:, 0]
    return np.asarray(smallest > gram_rounding(unit.shape[-1]))


def in_open_hemisphere(unit: Floats) -> Bools:
    """(R,): whether some y has <p_i, y> > 0 for all i; False also where rounding leaves it open.

    That is so exactly if zero is not in the convex hull of the inputs, whose Gram matrices unit
    (R, N, N) holds. The squared distance d^2 of the hull from zero comes from a non-negative least
    squares problem (Lawson & Hanson's LDP): min |P l|^2 + (1 - sum l)^2 over l >= 0 is
    d^2 / (1 + d^2). It is solved by Lawson and Hanson's active sets, on all R at once.
    """
    rows, count = unit.shape[:2]
    diagonal = np.arange(count)
    # Of the normal equations; the little on its diagonal keeps LAPACK from refusing a whole batch.
    system = unit.astype(np.float64) + 1
    system[:, diagonal, diagonal] += 2 * _EPS
    multipliers = np.zeros((rows, count))
    passive = np.zeros((rows, count), bool)
    active = np.arange(rows)
    for _ in range(3 * count):
        gradient = 1 - times(system[active], multipliers[active])
        gradient[passive[active]] = -np.inf
        entering = gradient.argmax(-1)
        # What is left below this is less than the threshold that decides.
        enters = gradient.max(-1) > gram_rounding(count) / 4
        active, entering = active[enters], entering[enters]
        if active.size == 0:
            break
        passive[active, entering] = True
        _solve_passive(system, passive, multipliers, active)
    residual = 1 - 2 * multipliers.sum(-1) + (multipliers * times(system, multipliers)).sum(-1)
    inside: Bools = residual > gram_rounding(count)
    inside[active] = False  # those that did not end: nothing is proven
    return inside


def _solve_passive(
    system: Floats, passive: Bools, multipliers: Floats, active: NDArray[np.intp]
) -> None:
    """Least squares over the passive sets; what would turn negative leaves its set."""
    diagonal = np.arange(system.shape[-1])
    for _ in range(system.shape[-1]):
        chosen, old = passive[active], multipliers[active]
        matrix = np.where(chosen[:, :, None] & chosen[:, None, :], system[active], 0)
        matrix[:, diagonal, diagonal] += ~chosen
        new = np.linalg.solve(matrix, chosen.astype(np.float64)[:, :, None])[:, :, 0]
        negative = chosen & (new <= 0)
        gap = np.where(negative, old - new, 1)
        step = np.where(negative, old / np.where(gap > 0, gap, 1), 1).min(-1, keepdims=True)
        moved = old + step * (new - old)
        moved[negative & (moved <= _EPS)] = 0
        multipliers[active] = np.where(chosen, moved, 0)
        passive[active] = chosen & ~(negative & (moved == 0))
        active = active[negative.any(-1)]
        if active.size == 0:
            return
