"""How far rounding errors in inner products move the coefficients of a mean."""

from __future__ import annotations

import numpy as np

from mergekit_karcher.sphere.trig import Floats, angle_terms


def coefficient_error(angles: Floats, error: float | Floats) -> Floats:
    """A bound, to first order, on the relative error of the coefficients k_i of R means, (R,).

    Arguments:
        angles: (R, N) radians from the inputs to their mean, which is a converged one.
        error: Each <W_i, W_j> is off by at most that, much smaller than one, times |W_i| |W_j|; of
            each mean, (R,), or of all.

    Returns:
        Infinity from a right angle on.

    With P the Gram matrix of the unit inputs, c the mean in them, C = Pc the cosines and
    L = P - CC', a change of P by E, |E_ij| <= 2 error, changes C by
    (I + L diag(w b) / alpha)^-1 (Ec - C c'Ec / 2): differentiate c_i = w_i f(theta_i) / alpha and
    c'Pc = 1, with f = theta / sin(theta), b = (1 - theta cot(theta)) / sin(theta)^2 and
    alpha = sum_i w_i theta_i cot(theta_i). By |L_ij| <= sin(theta_i) sin(theta_j) no entry of that
    is larger than 1 / a times the largest of the bracket, a = theta cot(theta) of the largest
    angle. f changes by b times as much, and norms and lengths by half the error of a square.
    """
    versines = 1 - np.cos(np.nanmax(angles, axis=-1))
    terms = angle_terms(versines)
    a = np.where(terms.theta_cot > 0, terms.theta_cot, np.nan)
    total = terms.theta_over_sin / a  # at least the sum of c
    cosines = 2 * error * total * (1 + total / 2) / a
    scale = error * total**2 + terms.curvature / a * cosines
    lengths = error / 2 * (1 + 1 / (1 - versines) ** 2)
    bound = terms.curvature / terms.theta_over_sin * cosines + scale + lengths
    return np.where(np.isnan(bound), np.inf, bound)
