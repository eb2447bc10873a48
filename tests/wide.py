"""Norms and angles of vectors in long double, from sums over their elements."""

from __future__ import annotations

import numpy as np

WIDE = np.longdouble


def angle(p, q):
    """Between two vectors, without their inner product."""
    p, q = (np.asarray(v, WIDE) / np.sqrt((np.asarray(v, WIDE) ** 2).sum()) for v in (p, q))
    return float(2 * np.arctan2(norm(p - q), norm(p + q)))


def norm(vector):
    return np.sqrt((np.asarray(vector, WIDE) ** 2).sum())
