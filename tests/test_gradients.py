"""Gradients through the merge, against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inputs import balanced, cap

from mergekit_karcher import Status, karcher_mean


def leaves(vectors, shape=(-1,)):
    return [torch.as_tensor(v).reshape(shape).clone().requires_grad_() for v in vectors]


@pytest.mark.parametrize("radius", [1e-3, 0.7, 1.4])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_gradients_match_finite_differences(radius, count):
    rng = np.random.default_rng(0)
    inputs = leaves(cap(rng, count, 12, radius), (3, 4))
    weights = rng.uniform(0.2, 2, count)
    assert torch.autograd.gradcheck(lambda *t: karcher_mean(t, weights)[0], inputs)


def test_gradients_of_dependent_inputs():
    """Five points in a plane: the coefficients are not unique, the mean and its derivative are."""
    rng = np.random.default_rng(1)
    inputs = leaves(cap(rng, 5, 2, 0.8))
    assert torch.autograd.gradcheck(lambda *t: karcher_mean(t)[0], inputs)


def test_gradients_near_the_edge_of_a_hemisphere():
    inputs = leaves(balanced(np.random.default_rng(2), 4, 9, 1.45))
    assert torch.autograd.gradcheck(lambda *t: karcher_mean(t)[0], inputs)


def test_gradients_of_the_fall_back_are_those_of_the_linear_mean():
    tensor = torch.randn(6, dtype=torch.float64)
    first, second = leaves([tensor, -tensor])
    mean, result = karcher_mean([first, second], [3, 1])
    assert result.status is Status.NOT_UNIQUE
    mean.sum().backward()
    torch.testing.assert_close(first.grad, torch.full_like(first, 0.75))
    torch.testing.assert_close(second.grad, torch.full_like(second, 0.25))


def test_zero_inputs_and_zero_weights_have_gradient_zero():
    first, zero, unused, second = leaves([np.ones(4), np.zeros(4), np.full(4, 9.0), np.arange(4.0)])
    karcher_mean([first, zero, unused, second], [1, 1, 0, 1])[0].sum().backward()
    assert torch.equal(zero.grad, torch.zeros(4, dtype=torch.float64))
    assert unused.grad is None
    assert first.grad.abs().sum() > 0


def test_a_zero_input_that_makes_the_mean_zero_stops_every_gradient():
    """The product of the norms is zero, whatever the other inputs do."""
    inputs = leaves([np.zeros(4), np.ones(4), np.arange(4.0)])
    mean, result = karcher_mean(inputs, magnitude="geometric")
    assert result.status is Status.CONVERGED
    mean.sum().backward()
    for tensor in inputs:
        assert torch.equal(tensor.grad, torch.zeros(4, dtype=torch.float64))


def test_only_inputs_that_ask_get_a_gradient_in_their_own_dtype_and_layout(monkeypatch):
    monkeypatch.setattr("mergekit_karcher.kernels.gram.CHUNK_ELEMENTS", 64)
    monkeypatch.setattr("mergekit_karcher.kernels.combine.CHUNK_ELEMENTS", 32)
    wide = torch.randn(9, 20, dtype=torch.float64).bfloat16().requires_grad_()
    narrow = torch.randn(20, 9, requires_grad=True)
    plain = torch.randn(9, 20)
    upstream = torch.randn(9, 20)
    mean, _ = karcher_mean([wide, narrow.T, plain])
    mean.backward(upstream)
    assert wide.grad.dtype == torch.bfloat16
    assert plain.grad is None
    exact = [t.detach().double().requires_grad_() for t in (wide, narrow.T, plain)]
    karcher_mean(exact)[0].backward(upstream.double())
    torch.testing.assert_close(narrow.grad.T.double(), exact[1].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(wide.grad.double(), exact[0].grad, rtol=2**-8, atol=1e-6)


def test_scaled_inputs_scale_nothing_in_the_gradient():
    """The merge is homogeneous of degree one: its derivative does not see the scale."""
    vectors = cap(np.random.default_rng(3), 3, 10, 0.9)
    small, large = leaves([v * 2.0**-400 for v in vectors]), leaves([v * 2.0**400 for v in vectors])
    for inputs in (small, large):
        karcher_mean(inputs)[0].sum().backward()
    for one, other in zip(small, large, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14)
