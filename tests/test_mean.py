"""The mean itself: the equation that defines it, its invariants, and where it does not exist."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import ambient_mean, balanced, cap, log_map

from mergekit_karcher import KarcherError, KarcherMean, Status, karcher_mean


def tensors(vectors, dtype=torch.float64):
    return [torch.as_tensor(np.asarray(v)).to(dtype) for v in vectors]


seeds = st.integers(0, 2**32 - 1)
radii = st.sampled_from([1e-8, 1e-3, 0.1, 0.7, 1.2, 1.5])
counts = st.sampled_from([2, 3, 5, 10])


@settings(deadline=None, max_examples=40)
@given(seeds, radii, counts)
def test_weighted_logs_at_the_mean_sum_to_zero(seed, radius, count):
    """Karcher 1977: the gradient of sum w angle^2 vanishes at the mean (paper, equation 10)."""
    rng = np.random.default_rng(seed)
    inputs = cap(rng, count, 40, radius)
    weights = rng.uniform(0.1, 2, count)
    mean, result = karcher_mean(tensors(inputs), weights)
    x = mean.numpy() / np.linalg.norm(mean.numpy())
    logs = np.array([log_map(x, v / np.linalg.norm(v)) for v in inputs])
    assert np.linalg.norm(weights / weights.sum() @ logs) < 1e-14
    np.testing.assert_allclose(result.angles, np.linalg.norm(logs, axis=1), rtol=1e-6, atol=1e-9)
    assert result.unique
    assert result.status is Status.CONVERGED


@settings(deadline=None, max_examples=25)
@given(seeds, radii, counts)
def test_norm_is_the_weighted_mean_of_the_norms(seed, radius, count):
    """Paper, equation 6."""
    rng = np.random.default_rng(seed)
    inputs = cap(rng, count, 40, radius)
    weights = rng.uniform(0.1, 2, count)
    mean, _ = karcher_mean(tensors(inputs), weights)
    expected = weights / weights.sum() @ [np.linalg.norm(v) for v in inputs]
    assert float(mean.norm()) == pytest.approx(expected, rel=1e-14)


@settings(deadline=None, max_examples=25)
@given(seeds, radii, st.floats(0.01, 0.99))
def test_two_inputs_give_slerp(seed, radius, share):
    """Shoemake 1985: sin((1-t) o)/sin(o) p + sin(t o)/sin(o) q."""
    first, second = cap(np.random.default_rng(seed), 2, 40, radius)
    mean, result = karcher_mean(tensors([first, second]), [1 - share, share])
    norms = np.linalg.norm(first), np.linalg.norm(second)
    p, q = first / norms[0], second / norms[1]
    angle = 2 * np.arctan2(np.linalg.norm(p - q), np.linalg.norm(p + q))
    direction = (np.sin((1 - share) * angle) * p + np.sin(share * angle) * q) / np.sin(angle)
    length = (1 - share) * norms[0] + share * norms[1]
    np.testing.assert_allclose(mean.numpy(), length * direction, rtol=0, atol=1e-13 * length)
    np.testing.assert_allclose(
        result.angles, [share * angle, (1 - share) * angle], rtol=1e-6, atol=1e-9
    )


@settings(deadline=None, max_examples=20)
@given(seeds, radii, counts)
def test_order_does_not_matter(seed, radius, count):
    rng = np.random.default_rng(seed)
    inputs, weights = cap(rng, count, 40, radius), rng.uniform(0.1, 2, count)
    order = rng.permutation(count)
    mean, result = karcher_mean(tensors(inputs), weights)
    other, permuted = karcher_mean(tensors([inputs[i] for i in order]), weights[order])
    torch.testing.assert_close(mean, other, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(result.coefficients[order], permuted.coefficients, rtol=1e-13)


@settings(deadline=None, max_examples=20)
@given(seeds, radii, counts, st.floats(1e-6, 1e6))
def test_only_ratios_of_weights_matter(seed, radius, count, factor):
    rng = np.random.default_rng(seed)
    inputs, weights = tensors(cap(rng, count, 40, radius)), rng.uniform(0.1, 2, count)
    torch.testing.assert_close(
        karcher_mean(inputs, weights * factor)[0],
        karcher_mean(inputs, weights)[0],
        rtol=1e-13,
        atol=1e-14,
    )


def test_a_doubled_input_is_an_input_with_twice_the_weight():
    first, second, third = tensors(cap(np.random.default_rng(0), 3, 40, 1.0))
    doubled, result = karcher_mean([first, second, third, first])
    assert result.unique
    torch.testing.assert_close(doubled, karcher_mean([first, second, third], [2, 1, 1])[0])


@pytest.mark.parametrize("power", [-30, -3, 0, 3, 30])
def test_scaled_inputs_give_the_scaled_mean_float32(power):
    inputs = tensors(cap(np.random.default_rng(1), 4, 50, 0.8, spread=0.1), torch.float32)
    mean, _ = karcher_mean(inputs)
    factor = 2.0 ** round(power * np.log2(10))
    scaled, result = karcher_mean([factor * tensor for tensor in inputs])
    assert result.converged
    assert torch.equal(scaled, factor * mean)


@pytest.mark.parametrize("power", [-500, -150, 150, 500])
def test_scaled_inputs_give_the_scaled_mean_float64(power):
    """Squares of 2^+-500 are far outside float64."""
    inputs = tensors(cap(np.random.default_rng(1), 4, 50, 0.8))
    factor = 2.0**power
    scaled, _ = karcher_mean([factor * tensor for tensor in inputs])
    assert torch.equal(scaled, factor * karcher_mean(inputs)[0])


def test_norms_over_three_hundred_orders_of_magnitude():
    rng = np.random.default_rng(2)
    directions = cap(rng, 3, 50, 0.8, spread=0)
    inputs = [d * scale for d, scale in zip(directions, (1e-150, 1.0, 1e150), strict=True)]
    mean, _ = karcher_mean(tensors(inputs))
    expected = ambient_mean(directions, [1, 1, 1]) * 1e150 / 3
    np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-12)


def test_bfloat16_norms_at_the_ends_of_its_range():
    """A coefficient for the smallest one would overflow float32."""
    base = torch.randn(100, generator=torch.Generator().manual_seed(0))
    small, large = (base * 1e-37).bfloat16(), (base.flip(0) * 1e37).bfloat16()
    mean, result = karcher_mean([small, large])
    expected = ambient_mean([small.double().numpy(), large.double().numpy()], [1, 1])
    assert result.coefficients[0] > 1e38
    torch.testing.assert_close(mean.double(), torch.as_tensor(expected), rtol=2**-8, atol=0)


def test_weight_zero_leaves_an_input_out_entirely():
    first, second, third = tensors(cap(np.random.default_rng(3), 3, 40, 1.0))
    broken = torch.full_like(third, torch.nan)
    mean, result = karcher_mean([first, broken, second], [0.4, 0, 0.6])
    assert torch.equal(mean, karcher_mean([first, second], [0.4, 0.6])[0])
    assert result.coefficients[1] == 0
    assert np.isnan(result.angles[1])


def test_an_input_of_weight_zero_may_be_anything():
    tensor = torch.ones(3, dtype=torch.bfloat16)
    others = [torch.ones(3, dtype=torch.float64), torch.ones(5), torch.ones(3).long()]
    mean, result = karcher_mean([tensor, *others], [1, 0, 0, 0])
    assert mean.dtype == torch.bfloat16
    assert result.coefficients.tolist() == [1, 0, 0, 0]


def test_one_input_comes_back_bit_for_bit():
    tensor = torch.tensor([[1.5, -0.0, 3e-42], [float(np.float32(1) / 3), 0.0, 2.0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        mean, result = karcher_mean([tensor.to(dtype)], [0.3])
        assert torch.equal(mean, tensor.to(dtype))
        assert torch.equal(mean.signbit(), tensor.signbit())
        assert mean.data_ptr() != tensor.data_ptr()
        assert result.coefficients.tolist() == [1.0]


def test_equal_inputs_give_that_input():
    tensor = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    mean, result = karcher_mean([tensor] * 17, np.arange(17))
    torch.testing.assert_close(mean, tensor, rtol=1e-6, atol=0)
    assert result.unique


def test_zero_inputs_count_in_the_magnitude_only():
    """Paper, equation 6: the weighted mean of the norms includes a norm of zero."""
    first, second = tensors(cap(np.random.default_rng(4), 2, 40, 1.0))
    mean, result = karcher_mean([first, torch.zeros_like(first), second], [1, 2, 1])
    torch.testing.assert_close(mean, karcher_mean([first, second])[0] / 2)
    assert result.coefficients[1] == 0
    assert np.isnan(result.angles[1])


def test_all_zero_inputs():
    mean, result = karcher_mean([torch.zeros(3, 4)] * 2)
    assert torch.equal(mean, torch.zeros(3, 4))
    assert result.status is Status.ZERO
    assert result.converged


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.7, 0.3]])
def test_antipodal_inputs_fall_back_to_the_linear_mean(weights):
    """Every point between them is as good: there is no mean to return."""
    tensor = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, result = karcher_mean([tensor, -2 * tensor], weights)
    torch.testing.assert_close(mean, (weights[0] - 2 * weights[1]) * tensor)
    assert result.status is Status.NOT_UNIQUE
    assert not result.unique
    assert not result.converged
    assert "linear mean" in result.status.value


def test_three_points_on_a_great_circle_fall_back():
    """At 120 degrees the best point in their plane is worse than the two poles."""
    frame, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((30, 2)))
    inputs = [frame @ [np.cos(a), np.sin(a)] for a in 2 * np.pi / 3 * np.arange(3)]
    mean, result = karcher_mean(tensors(inputs), [1, 2, 3])
    assert result.status is Status.NOT_UNIQUE
    expected = np.array([1, 2, 3]) / 6 @ np.array(inputs)
    np.testing.assert_allclose(mean.numpy(), expected, atol=1e-15)


def test_scalars_of_mixed_sign_fall_back_and_of_one_sign_do_not():
    mixed, result = karcher_mean(tensors([1.0, -2.0, 4.0]))
    assert result.status is Status.NOT_UNIQUE
    assert float(mixed) == pytest.approx(1.0)
    same, result = karcher_mean(tensors([1.0, 2.0, 4.5]))
    assert result.unique
    assert float(same) == pytest.approx(2.5)


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(3, 10), st.integers(2, 3))
def test_dependent_inputs_in_a_hemisphere_reach_the_lowest_objective(seed, count, size):
    """Points on a circle or S^2 are dependent, and the mean of skewed weights is far from some.

    Every point of a fine grid of the sphere, and each input, is no better than the answer.
    """
    rng = np.random.default_rng(seed)
    pole = np.eye(size)[0]
    inputs = rng.standard_normal((count, size))
    inputs *= np.where(inputs[:, :1] < 0, -1, 1)
    inputs[:, 0] += 0.05
    units = inputs / np.linalg.norm(inputs, axis=1)[:, None]
    weights = 10.0 ** rng.uniform(-3, 0, count)
    mean, result = karcher_mean(tensors(inputs), weights)
    assert result.unique
    assert result.status is Status.CONVERGED

    def objective(points):
        return weights @ np.arccos(np.clip(units @ points.T, -1, 1)) ** 2

    x = mean.numpy() / np.linalg.norm(mean.numpy())
    grid = rng.standard_normal((4000, size))
    grid = np.vstack([grid / np.linalg.norm(grid, axis=1)[:, None], units, pole])
    assert objective(x[None])[0] <= objective(grid).min() + 1e-12


def test_nearly_antipodal_inputs_are_still_certified():
    """At 3.1 radians apart two inputs are independent, and SLERP is well defined."""
    angle = 3.1
    inputs = [np.eye(20)[0], np.cos(angle) * np.eye(20)[0] + np.sin(angle) * np.eye(20)[1]]
    mean, result = karcher_mean(tensors(inputs))
    assert result.unique
    expected = (inputs[0] + inputs[1]) / np.linalg.norm(inputs[0] + inputs[1])
    np.testing.assert_allclose(mean.numpy(), expected, atol=1e-13)


def test_hundred_inputs():
    rng = np.random.default_rng(6)
    inputs, weights = cap(rng, 100, 300, 1.3), 10.0 ** rng.uniform(-9, 0, 100)
    mean, result = karcher_mean(tensors(inputs), weights)
    assert result.converged
    np.testing.assert_allclose(mean.numpy(), ambient_mean(inputs, weights), atol=1e-13)


def test_near_collinear_inputs_give_the_linear_mean():
    """Paper, 5.2: to first order in the angle the sphere is flat."""
    inputs = cap(np.random.default_rng(7), 5, 60, 1e-5, spread=0)
    mean, _ = karcher_mean(tensors(inputs))
    np.testing.assert_allclose(mean.numpy(), np.mean(inputs, axis=0), atol=1e-10)


def test_orthogonal_inputs_keep_their_length():
    """Paper, 5.3: the linear mean of N orthogonal inputs shrinks by sqrt(N), this one does not."""
    mean, result = karcher_mean(tensors(3 * np.eye(9)))
    np.testing.assert_allclose(mean.numpy(), np.ones(9), rtol=1e-14)
    np.testing.assert_allclose(result.angles, np.arccos(1 / 3), rtol=1e-14)


def test_too_few_steps_are_reported_and_more_cure_it():
    inputs = tensors([*balanced(np.random.default_rng(8), 6, 40, 1.5), np.eye(40)[0]])
    weights = [1, 2, 3, 4, 5, 6, 0.1]
    _, hasty = karcher_mean(inputs, weights, max_iter=1, tol=1e-12)
    assert hasty.status is Status.NOT_CONVERGED
    assert not hasty.converged
    assert hasty.iterations == 1
    assert hasty.residual > 1e-12
    assert "max_iter" in hasty.status.value
    _, patient = karcher_mean(inputs, weights)
    assert patient.converged
    assert patient.iterations <= 12


def test_tolerance_is_met_and_a_looser_one_takes_fewer_steps():
    inputs = tensors(cap(np.random.default_rng(9), 6, 40, 1.3))
    results = [karcher_mean(inputs, np.arange(1, 7), tol=tol)[1] for tol in (1e-1, 1e-5, 1e-12)]
    for loose, tight in itertools.pairwise(results):
        assert loose.iterations <= tight.iterations
    assert results[0].iterations < results[-1].iterations
    for result, tol in zip(results, (1e-1, 1e-5, 1e-12), strict=True):
        assert result.residual <= tol


def test_an_unreachable_tolerance_counts_as_rounding():
    _, result = karcher_mean(tensors(cap(np.random.default_rng(9), 6, 40, 1.3)), tol=1e-300)
    assert result.converged


def test_the_result_is_frozen():
    _, result = karcher_mean([torch.ones(3)])
    assert isinstance(result, KarcherMean)
    with pytest.raises(AttributeError):
        result.unique = False


BAD_CALLS = [
    ([], None, {}, "at least one tensor"),
    ([torch.ones(2), torch.ones(2)], [1.0], {}, "1 weights were given for 2 inputs"),
    ([torch.ones(2), torch.ones(2)], [1.0, -0.5], {}, "weight of input 1 .* is -0.5"),
    ([torch.ones(2), torch.ones(2)], [1.0, torch.nan], {}, "weight of input 1 .* is nan"),
    ([torch.ones(2), torch.ones(2)], [torch.inf, 1.0], {}, "weight of input 0 .* is inf"),
    ([torch.ones(2), torch.ones(2)], [0.0, 0.0], {}, "All weights .* are zero"),
    ([torch.ones(2)], None, {"tol": 0.0}, "tol is 0.0: give a positive"),
    ([torch.ones(2)], None, {"tol": torch.nan}, "tol is nan"),
    ([torch.ones(2)], None, {"max_iter": 0}, "max_iter is 0: give a whole number"),
    ([torch.ones(2)], None, {"max_iter": torch.inf}, "max_iter is inf: give a whole number"),
    ([torch.ones(2)], None, {"max_iter": 2.5}, "max_iter is 2.5: give a whole number"),
    ([torch.ones(2), torch.ones(3)], None, {}, r"input 1 has shape \(3,\), but input 0"),
    ([torch.ones(2), torch.ones(2).long()], None, {}, "input 1 is torch.int64.*convert it"),
    ([torch.ones(2), torch.ones(2, device="meta")], None, {}, "input 1 is on meta"),
    (
        [torch.ones(2), torch.tensor([1, torch.nan])],
        None,
        {},
        r"input 1 is .* 1 of 2 .*nan at \[1\]",
    ),
    ([torch.tensor([[1, -torch.inf]]), torch.ones(1, 2)], None, {}, r"input 0 .*-inf at \[0, 1\]"),
]


@pytest.mark.parametrize(("inputs", "weights", "options", "message"), BAD_CALLS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_bad_calls_get_one_sentence(inputs, weights, options, message, dtype):
    if dtype is not None:
        inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
    with pytest.raises(KarcherError, match=message) as error:
        karcher_mean(inputs, weights, **options)
    assert str(error.value).count("\n") == 0
    assert isinstance(error.value, RuntimeError)
