"""How close the answer is to a 50-digit one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inputs import balanced, cap
from mpmath import mpf
from reference import karcher

from mergekit_karcher import karcher_mean

ULPS = {torch.float64: 16, torch.float32: 1, torch.float16: 1, torch.bfloat16: 1}
RADII = [1e-8, 1e-4, 0.1, 0.7, 1.2, 1.4, 1.5, 1.55]


def check_against_reference(vectors, weights, dtype):
    tensors = [torch.as_tensor(v).to(dtype) for v in vectors]
    exact = [tensor.double().tolist() for tensor in tensors]
    expected, mean, angles, alpha = karcher(exact, weights)
    merged, result = karcher_mean(tensors, weights)
    assert result.unique
    assert result.converged

    worst = max(
        abs((mpf(k) - e) / e) for k, e in zip(result.coefficients.tolist(), expected, strict=True)
    )
    assert worst <= mpf("1e-14") / alpha

    scales = [
        sum(abs(k * mpf(v)) for k, v in zip(expected, column, strict=True))
        for column in zip(*exact, strict=True)
    ]
    ulps = [
        abs(mpf(v) - e) / s / torch.finfo(dtype).eps
        for v, e, s in zip(merged.double().tolist(), mean, scales, strict=True)
    ]
    assert max(ulps) <= ULPS[dtype]
    np.testing.assert_allclose(result.angles, [float(a) for a in angles], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ULPS, ids=str)
@pytest.mark.parametrize("radius", RADII)
def test_points_in_a_cap(radius, dtype):
    if dtype is torch.float16 and radius < 1e-3:
        radius = 1e-3  # float16 has no two vectors closer than that which differ
    rng = np.random.default_rng(0)
    for count in (2, 3, 10):
        check_against_reference(cap(rng, count, 32, radius), [1.0] * count, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("radius", RADII[2:])
def test_balanced_points_where_errors_are_amplified_most(radius, dtype):
    rng = np.random.default_rng(1)
    for count in (2, 6):
        check_against_reference(balanced(rng, count, 24, radius), [1.0] * count, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("radius", [1e-8, 0.7, 1.55])
def test_weights_over_nine_orders_of_magnitude(radius, dtype):
    rng = np.random.default_rng(2)
    check_against_reference(cap(rng, 10, 32, radius), (10.0 ** -np.arange(10)).tolist(), dtype)


@pytest.mark.parametrize("radius", [0.1, 1.0])
def test_a_hundred_models(radius):
    rng = np.random.default_rng(3)
    weights = (10.0 ** rng.uniform(-9, 0, 100)).tolist()
    check_against_reference(cap(rng, 100, 120, radius), weights, torch.float64)
    check_against_reference(cap(rng, 100, 120, radius), [1.0] * 100, torch.float32)


def test_many_pieces_round_no_more_than_one(monkeypatch):
    """Sums over many chunks and threads are as exact as one over all."""
    monkeypatch.setattr("mergekit_karcher.kernels.gram.CHUNK_ELEMENTS", 24)
    monkeypatch.setattr("mergekit_karcher.kernels.gram._SUM_ELEMENTS", 4)
    monkeypatch.setattr("mergekit_karcher.kernels.combine.CHUNK_ELEMENTS", 7)
    rng = np.random.default_rng(4)
    for dtype in ULPS:
        check_against_reference(cap(rng, 3, 101, 1.2), [1.0, 2.0, 0.5], dtype)
