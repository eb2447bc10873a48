"""An independent, slow Karcher mean in 50 digits. Imports nothing from the package."""

from __future__ import annotations

from mpmath import mp, mpf

mp.dps = 50


def karcher(inputs, weights):
    """The weighted Karcher mean of plain vectors by Algorithm 1 of the paper, in ambient space.

    inputs: N lists of D floats, taken as exact. weights: N positive floats.
    Returns (coefficients k_i with W = sum k_i W_i, mean W, angles to it, alpha), all mpf; alpha is
    the smallest eigenvalue of the Hessian of the objective (half of the sum of w angle^2) where
    D > N: directions outside the span of the inputs have exactly that curvature.
    """
    vectors = [[mpf(v) for v in vector] for vector in inputs]
    total = sum(mpf(w) for w in weights)
    shares = [mpf(w) / total for w in weights]
    norms = [mp.sqrt(_dot(v, v)) for v in vectors]
    units = [[v / n for v in vector] for vector, n in zip(vectors, norms, strict=True)]
    x = _unit(_combine(shares, units))
    for _ in range(20000):
        angles = [_angle(x, unit) for unit in units]
        pulls = [w * _theta_over_sin(t) for w, t in zip(shares, angles, strict=True)]
        alpha = sum(w * _theta_over_sin(t) * mp.cos(t) for w, t in zip(shares, angles, strict=True))
        step = [a - alpha * b for a, b in zip(_combine(pulls, units), x, strict=True)]
        length = mp.sqrt(_dot(step, step))
        if length < mpf(10) ** -32:
            break
        x = _unit(
            [mp.cos(length) * b + mp.sin(length) * a / length for a, b in zip(step, x, strict=True)]
        )
    else:
        raise AssertionError("the reference did not converge")
    magnitude = sum(w * n for w, n in zip(shares, norms, strict=True))
    coefficients = [magnitude * p / (alpha * n) for p, n in zip(pulls, norms, strict=True)]
    return coefficients, [magnitude * v for v in x], angles, alpha


def _dot(a, b):
    return mp.fdot(zip(a, b, strict=True))


def _combine(factors, vectors):
    return [mp.fdot(zip(factors, column, strict=True)) for column in zip(*vectors, strict=True)]


def _unit(vector):
    norm = mp.sqrt(_dot(vector, vector))
    return [v / norm for v in vector]


def _angle(a, b):
    difference = [p - q for p, q in zip(a, b, strict=True)]
    summed = [p + q for p, q in zip(a, b, strict=True)]
    return 2 * mp.atan2(mp.sqrt(_dot(difference, difference)), mp.sqrt(_dot(summed, summed)))


def _theta_over_sin(angle):
    return mpf(1) if angle == 0 else angle / mp.sin(angle)
