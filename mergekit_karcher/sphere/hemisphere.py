"""Whether unit inputs lie in one open hemisphere, where their mean is unique (Buss & Fillmore)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergekit_karcher.sphere.trig import Floats, times

_EPS = float(np.finfo(np.float64).eps)


def gram_rounding(count: int) -> float:
    """A bound on the spectral norm of the rounding errors in a unit Gram matrix of that size."""
    return 64 * count * _EPS


def linearly_independent(unit: Floats) -> NDArray[np.bool_]:
    """Whether unit inputs (R, N, N) are independent, so that they lie in an open hemisphere.

    By Weyl's inequality the smallest eigenvalue is off by no more than the Gram matrix is.
    """
    smallest = np.linalg.eigvalsh(unit.astype(np.float64))[:, 0]
    independent: NDArray[np.bool_] = smallest > gram_rounding(unit.shape[-1])
    return independent


def in_open_hemisphere(unit: Floats) -> NDArray[np.bool_]:
    """Whether some y has <p_i, y> > 0 for all i, for each of the Gram matrices unit (R, N, N).

    That is so exactly if zero is not in the convex hull of the inputs. The squared distance d^2
    of the hull from zero comes from a non-negative least squares problem (Lawson & Hanson's LDP):
    min |P l|^2 + (1 - sum l)^2 over l >= 0 is d^2 / (1 + d^2). It is solved by Lawson and Hanson's
    active sets, on all R at once.
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
    inside: NDArray[np.bool_] = residual > gram_rounding(count)
    inside[active] = False  # those that did not end: nothing is proven
    return inside


def _solve_passive(
    system: Floats, passive: NDArray[np.bool_], multipliers: Floats, active: NDArray[np.intp]
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
