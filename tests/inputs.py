"""Hard inputs, all from here: points in a cap, balanced points, duplicates, zeros, huge spreads."""

from __future__ import annotations

import numpy as np
import torch


def cap(rng, count, size, radius, spread=1.0):
    """Vectors in random directions at exactly that angle from one direction, norms log-normal."""
    centre = _unit(rng.standard_normal(size))
    return [
        (np.cos(radius) * centre + np.sin(radius) * _tangent(rng, centre))
        * np.exp(spread * rng.standard_normal())
        for _ in range(count)
    ]


def balanced(rng, count, size, radius):
    """Pairs opposite each other around one direction, which is their mean: all at that angle.

    The hardest case: the linear mean is cos(radius) long, and so amplifies every error.
    """
    frame, _ = np.linalg.qr(rng.standard_normal((size, count // 2 + 1)))
    centre, *sides = frame.T
    return [
        (np.cos(radius) * centre + sign * np.sin(radius) * side) * np.exp(rng.standard_normal())
        for side in sides
        for sign in (1, -1)
    ]


def hard_spheres(rng):
    """Batches of N vectors, (4, N, D), of which some have no mean, no direction or no length."""
    for size in (1, 2, 3, 5):
        for count in (1, 2, 3, 4, 7):
            plain = rng.standard_normal((4, count, size))
            yield plain
            zeros = plain.copy()
            zeros[0], zeros[1, 0] = 0, 0
            yield zeros
            antipodal = plain.copy()
            antipodal[:, 0] = -antipodal[:, -1]
            yield antipodal
            yield rng.integers(-1, 2, plain.shape).astype(np.float64)
            yield plain[:, [0] * count]
            yield np.concatenate([np.abs(plain[..., :1]) + 1e-9, plain[..., 1:]], axis=-1)


def ambient_mean(inputs, weights, steps=4000):
    """A plain float64 Karcher mean of whole vectors (Algorithm 1), where 50 digits are slow."""
    matrix = np.array([_unit(v) for v in inputs])
    shares = np.array(weights) / np.sum(weights)
    x = _unit(shares @ matrix)
    for _ in range(steps):
        step = shares @ np.array([log_map(x, p) for p in matrix])
        length = np.linalg.norm(step)
        if length < 1e-15:
            break
        x = _unit(np.cos(length) * x + np.sin(length) * step / length)
    return x * (shares @ [np.linalg.norm(v) for v in inputs])


def log_map(x, p):
    """The tangent vector at x towards p, as long as the angle between them."""
    tangent = p - (x @ p) * x
    length = np.linalg.norm(tangent)
    angle = 2 * np.arctan2(np.linalg.norm(x - p), np.linalg.norm(x + p))
    return tangent * (angle / length) if length > 0 else np.zeros_like(x)


def _tangent(rng, centre):
    side = rng.standard_normal(len(centre))
    return _unit(side - centre * (side @ centre))


def _unit(vector):
    return np.asarray(vector) / np.linalg.norm(vector)


def mean_of(tensors, weights=None):
    """The Karcher mean of whole tensors, by the slow reference."""
    flat = [tensor.double().numpy().ravel() for tensor in tensors]
    mean = ambient_mean(flat, weights or [1] * len(flat))
    return torch.as_tensor(mean).reshape(tensors[0].shape)
