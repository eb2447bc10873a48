"""The sphere by itself: functions of an angle, the steps, and numbers that stay finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from inputs import cap, hard_spheres
from mpmath import mp, mpf

from mergekit_karcher import karcher_mean
from mergekit_karcher.sphere.descent import Spheres
from mergekit_karcher.sphere.magnitude import Magnitude
from mergekit_karcher.sphere.results import Status
from mergekit_karcher.sphere.solver import solve_means
from mergekit_karcher.sphere.trig import angle_terms
from mergekit_karcher.sphere.vjp import vjp

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


def solved(vectors, upstream, weights, magnitude, max_iter=100):
    """The means of R groups of vectors (R, N, D), and their derivative towards (R, D)."""
    everything = np.concatenate([vectors, upstream[:, None]], axis=1)
    gram = everything @ everything.transpose(0, 2, 1)
    exponents = np.zeros(gram.shape[:2], np.int64)
    options = {"magnitude": magnitude, "max_iter": max_iter, "tol": 1e-12}
    means = solve_means(gram[:, :-1, :-1], weights, exponents[:, :-1], **options)
    return means, vjp(gram, weights, exponents, means, magnitude)


@pytest.mark.parametrize("magnitude", Magnitude)
@pytest.mark.parametrize("max_iter", [1, 2, 100])
def test_nothing_is_divided_by_zero(magnitude, max_iter):
    """Zeros, fall-backs and means of no length stand beside others in one batch."""
    rng = np.random.default_rng(0)
    statuses = set()
    for vectors in hard_spheres(rng):
        weights = 10.0 ** rng.uniform(-3, 0, vectors.shape[1])
        upstream = rng.standard_normal((len(vectors), vectors.shape[2]))
        for given in (weights, np.ones_like(weights)):
            with np.errstate(divide="raise", invalid="raise", over="raise"):
                means, gradients = solved(vectors, upstream, given, magnitude, max_iter)
            assert np.isfinite(means.coefficients).all()
            assert all(np.isfinite(part).all() for part in gradients)
            statuses.update(means.statuses)
    assert statuses >= {Status.CONVERGED, Status.NOT_UNIQUE, Status.ZERO}


@pytest.mark.parametrize("magnitude", Magnitude)
def test_means_in_one_batch_have_nothing_to_do_with_each_other(magnitude):
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((6, 3, 5))
    vectors[0] = 0
    vectors[1, 0] = 0
    vectors[2, 0] = -vectors[2, 1]
    upstream, weights = rng.standard_normal((6, 5)), np.array([1.0, 2.0, 0.5])
    together, (ahead, among) = solved(vectors, upstream, weights, magnitude)
    assert len(set(together.statuses)) == 3
    for row in range(6):
        alone, parts = solved(vectors[row : row + 1], upstream[row : row + 1], weights, magnitude)
        assert alone.statuses[0] is together.statuses[row]
        for one, same in (
            (alone.coefficients[0], together.coefficients[row]),
            (parts[0][0], ahead[row]),
            (parts[1][0], among[row]),
        ):
            np.testing.assert_allclose(one, same, rtol=1e-12, atol=1e-14)
