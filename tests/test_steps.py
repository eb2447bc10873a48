"""What the answer alone does not show: the table of functions, the steps, the exact sums."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from inputs import cap
from mpmath import mp, mpf

from mergekit_karcher import karcher_mean
from mergekit_karcher.kernels.gram import grams
from mergekit_karcher.sphere.descent import Spheres
from mergekit_karcher.sphere.trig import angle_terms

mp.dps = 50

ANGLES = [1e-9, 1e-6, 1e-3, 0.019, 0.0199999, 0.0200001, 0.03, 0.5, 1.5, 1.58, 3.0, 3.14]


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("dtype", [np.float64, np.longdouble])
def test_functions_of_an_angle_equal_their_closed_forms(angle, dtype):
    """On both sides of the switch between series and closed form."""
    versine = 2 * mp.sin(mpf(angle) / 2) ** 2
    terms = angle_terms(np.array([dtype(float(versine))]))
    exact = mpf(float(versine))
    theta = 2 * mp.asin(mp.sqrt(exact / 2))
    expected = {
        "theta": theta,
        "theta_over_sin": theta / mp.sin(theta),
        "theta_cot": theta * mp.cot(theta),
        "curvature": (1 - theta * mp.cot(theta)) / mp.sin(theta) ** 2,
    }
    for name, value in expected.items():
        assert float(getattr(terms, name)[0]) == pytest.approx(float(value), rel=1e-11), name


def test_functions_of_an_angle_at_zero_and_pi():
    at_zero, at_pi = angle_terms(np.array([0.0])), angle_terms(np.array([2.0]))
    assert [float(term[0]) for term in at_zero] == [0, 1, 1, 1 / 3]
    assert float(at_pi.theta[0]) == math.pi
    assert all(np.isfinite(term).all() for term in at_pi)


def test_steps_go_down_and_never_beyond_a_radian():
    """Newton is trusted only as far as that; from points near the edge it would leave the sphere's
    other side, and once in a while climb."""
    rng = np.random.default_rng(0)
    taken = 0
    for _ in range(600):
        size = int(rng.integers(2, 6))
        units = rng.standard_normal((int(rng.integers(2, 9)), size))
        units /= np.linalg.norm(units, axis=1)[:, None]
        weights = 10.0 ** rng.uniform(-3, 0, len(units))
        gram = units @ units.T
        sphere = Spheres(2 - 2 * gram[None], (weights / weights.sum())[None])
        point = sphere.points(np.eye(len(units))[:1])
        for _ in range(4):
            after = sphere.step(point)
            cosine = point.coefficients[0] @ gram @ after.coefficients[0]
            if point.alpha[0] > 1e-3:
                taken += 1
                assert after.objective[0] <= point.objective[0] + 1e-9
                assert math.acos(min(1.0, max(-1.0, cosine))) <= 1 + 1e-6
            point = after
    assert taken > 1000


def test_a_loose_tolerance_still_gets_the_square_of_it():
    """The step past the tolerance is Newton's: what remains is far below."""
    vectors = cap(np.random.default_rng(9), 6, 40, 1.3)
    _, result = karcher_mean([torch.as_tensor(v) for v in vectors], np.arange(1, 7), tol=1e-4)
    assert result.residual < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gram_is_better_than_float64(dtype, monkeypatch):
    """Against exact rational sums, over thousands of chunks."""
    monkeypatch.setattr("mergekit_karcher.kernels.gram.CHUNK_ELEMENTS", 8)
    monkeypatch.setattr("mergekit_karcher.kernels.gram._SUM_ELEMENTS", 4)
    generator = torch.Generator().manual_seed(0)
    tensors = list(torch.randn(2, 9001, generator=generator, dtype=torch.float64).to(dtype))
    (matrix,), (exponents,) = grams(tensors, exact=True)
    rows = [[Fraction(v) for v in tensor.tolist()] for tensor in tensors]
    for i, j in ((0, 0), (0, 1), (1, 1)):
        exact = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        size = sum(abs(a * b) for a, b in zip(rows[i], rows[j], strict=True))
        value = Fraction(*np.ldexp(matrix, exponents[:, None] + exponents)[i, j].as_integer_ratio())
        bound = 2.0**-60 if np.finfo(np.longdouble).nmant > 52 else 2.0**-52
        assert abs(value - exact) <= bound * size
