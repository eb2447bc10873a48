"""Products in float32: what they may be off by, and that no output shows more than one unit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inputs import balanced, cap
from mpmath import mp, mpf
from reference import karcher

from mergekit_karcher import KarcherError, karcher_mean
from mergekit_karcher.kernels.gram import SINGLE_ERROR, Precision, grams
from mergekit_karcher.means import precision, products
from mergekit_karcher.means.autograd import merge
from mergekit_karcher.means.inputs import checked_inputs
from mergekit_karcher.means.solve import Settings
from mergekit_karcher.sphere.magnitude import Magnitude
from mergekit_karcher.sphere.pairwise import geometry_of_gram
from mergekit_karcher.sphere.results import Status
from mergekit_karcher.sphere.rounding import coefficient_error
from mergekit_karcher.sphere.solver import solve_means

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def passes(monkeypatch):
    """The precisions of the passes over whole tensors, in order; small tensors count as large."""
    monkeypatch.setattr(precision, "_SAMPLE", 64)
    made = []

    def recorded(tensors, **options):
        if tensors[0].numel() > 64 and (tensors[0].ndim == 1 or len(tensors[0]) > 2):
            made.append(options["precision"])
        return grams(tensors, **options)

    monkeypatch.setattr(precision, "grams", recorded)
    monkeypatch.setattr(products, "grams", recorded)
    return made


def merged(tensors, weights=None, base=None, **settings):
    inputs = checked_inputs("the tensor", tensors, None, weights, base=base)
    return merge(inputs, Settings(for_output=True, **settings))


def drawn(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hard_pairs():
    """Pairs of vectors whose products round badly in float32, by name."""
    size = 5000
    heavy = torch.distributions.StudentT(1.5)
    torch.manual_seed(0)
    yield "normal", drawn(size), drawn(size, seed=1)
    yield "equal entries", torch.full((size,), 0.7), torch.full((size,), 0.3)
    yield "heavy tails", heavy.sample((size,)), heavy.sample((size,))
    yield "one large entry", torch.eye(1, size)[0] * 100 + 0.01, torch.full((size,), 0.013)
    signs = torch.ones(size)
    signs[::2] = -1
    yield "cancelling", torch.full((size,), 1.1), signs
    yield "few of many", drawn(size) * (torch.arange(size) % 701 == 0), drawn(size, seed=2)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_float32_products_are_off_by_no_more_than_their_bound(dtype, based, by_row):
    for name, *pair in hard_pairs():
        tensors = [vector.to(dtype).view(4, -1) for vector in pair]
        base = drawn(4, tensors[0].shape[1], dtype=dtype, seed=9) if based else None
        matrices, exponents = grams(tensors, base=base, by_row=by_row, precision=Precision.SINGLE)
        assert not exponents.any()
        wide = torch.stack([t.double() - (0 if base is None else base.double()) for t in tensors])
        wide = wide.transpose(0, 1) if by_row else wide.flatten(1)[None]
        exact = (wide @ wide.mT).numpy()
        lengths = np.sqrt(np.diagonal(exact, axis1=1, axis2=2))
        bound = SINGLE_ERROR * lengths[:, :, None] * lengths[:, None, :]
        assert (np.abs(matrices - exact) <= bound).all(), name


@pytest.mark.parametrize("magnitude", list(Magnitude))
@pytest.mark.parametrize("radius", [1e-3, 0.1, 0.5, 0.955, 1.2])
def test_coefficients_move_no_further_than_their_bound(magnitude, radius):
    """To first order: the sum of what each entry moves them by, in the sign that is worst."""
    rng = np.random.default_rng(0)
    error, used = 1e-9, 0.0
    for size in (2, 3, 4, 8):
        for vectors in (cap(rng, size, 40, radius), balanced(rng, size, 40, radius)):
            count = len(vectors)
            matrix = np.array(vectors)
            gram = (matrix @ matrix.T).astype(np.longdouble)
            lengths = np.sqrt(np.diagonal(gram))
            weights = 10.0 ** rng.uniform(-2, 0, count)

            def mean(gram, weights=weights, count=count):
                exponents = np.zeros((1, count), np.int64)
                options = {"magnitude": magnitude, "max_iter": 100, "tol": 1e-12}
                return solve_means(gram[None], weights, exponents, **options)

            before = mean(gram)
            assert before.statuses[0] is Status.CONVERGED
            (bound,) = coefficient_error(before.angles, error)
            moved = np.zeros(count)
            for place in zip(*np.tril_indices(count), strict=True):
                change = np.zeros((count, count))
                change[place] = change[place[::-1]] = error * lengths[[*place]].prod()
                moved += np.abs(mean(gram + change).coefficients[0] / before.coefficients[0] - 1)
            assert moved.max() <= 1.001 * bound
            used = max(used, moved.max() / bound)
    # A bound that is far too large would be of no use, nor would one that nothing comes near.
    assert used > (0.15 if radius < 0.9 else 0.005)


def test_no_bound_from_a_right_angle_on():
    angles = np.array([[0.1, 1.5708], [0.1, 2.0], [np.nan, 1.0]])
    assert np.isinf(coefficient_error(angles, 1e-6)).tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("radius", [1e-3, 0.03, 0.1, 0.7, 0.955, 1.1, 1.2, 1.4, 1.55])
def test_outputs_are_within_one_unit_of_50_digits(radius, dtype, passes):
    rng = np.random.default_rng(5)
    for count, weights in (
        (2, None),
        (3, [1.0, 2.0, 0.5]),
        (10, (10.0 ** -np.arange(10)).tolist()),
    ):
        for vectors in (
            cap(rng, count, 200, radius),
            cap(rng, count, 200, radius, spread=0.02),
            balanced(rng, 2, 200, radius),
        ):
            tensors = [torch.as_tensor(v).to(dtype) for v in vectors]
            shares = weights if weights and len(tensors) == count else [1.0] * len(tensors)
            exact = [tensor.double().tolist() for tensor in tensors]
            factors, mean, _, _ = karcher(exact, shares)
            result, _ = merged(tensors, shares)
            for value, expected, column in zip(
                result.double().tolist(), mean, zip(*exact, strict=True), strict=True
            ):
                scale = mp.fsum(abs(k * mpf(v)) for k, v in zip(factors, column, strict=True))
                # Below the smallest normal number units are as large as there.
                unit = torch.finfo(dtype).eps * max(scale, torch.finfo(dtype).tiny)
                assert abs(mpf(value) - expected) <= unit
    used = {one for one in Precision if one in passes}
    if radius <= 0.7:
        assert Precision.SINGLE in used
    if radius > 1.3:
        assert Precision.DOUBLE in used


@pytest.mark.parametrize("change", [1e-4, 1e-3, 1e-2, 5e-2])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_small_angles_are_right_in_float32_too(change, granularity, passes):
    """Closing lines show them."""
    base = drawn(300, 700).double()
    tensors = [base + change * drawn(300, 700, seed=seed).double() for seed in (1, 2, 3)]
    tensors = [tensor.bfloat16() for tensor in tensors]
    tensors.append(tensors[1].clone())
    result, solution = merged(tensors, granularity=granularity)
    assert passes == [Precision.SINGLE]
    vectors = torch.stack([tensor.double().flatten() for tensor in tensors])
    units = vectors / vectors.norm(dim=1, keepdim=True)
    chords = torch.cdist(units, units, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    found = solution.products[0]
    angles = geometry_of_gram(found.grams[0], found.exponents[0]).angles
    np.testing.assert_allclose(2 * np.sin(angles / 2), chords, rtol=1e-3, atol=1e-9)
    expected, _ = karcher_mean(tensors, granularity=granularity)
    assert (result != expected).float().mean() < 0.01


def test_models_that_are_all_the_same_give_that_model(passes):
    tensor = drawn(300, 40)
    result, solution = merged([tensor, tensor.clone(), tensor.clone()])
    assert passes == [Precision.SINGLE]
    assert torch.equal(result, tensor)
    assert (solution.mean.angles < 1e-9).all()


def test_a_model_far_from_two_near_ones_is_left_to_float64(passes):
    first = drawn(300, 40)
    near = first + 0.004 * drawn(300, 40, seed=1)
    merged([drawn(300, 40, seed=2), first, near])
    assert passes == [Precision.DOUBLE]


def test_changes_of_a_base_that_are_near_each_other(passes):
    base, change = drawn(300, 40), drawn(300, 40, seed=1)
    tensors = [base + change * (1 + 0.003 * drawn(300, 40, seed=seed)) for seed in (2, 3)]
    _, solution = merged(tensors, base=base)
    assert passes[-1] is Precision.DOUBLE
    _, expected = karcher_mean(tensors, base=base)
    np.testing.assert_array_equal(solution.mean.angles, expected.angles)


def test_a_guess_from_the_first_rows_that_is_wrong(passes):
    """What the whole pass found decides in the end."""
    first, second = drawn(300, 40), drawn(300, 40, seed=1)
    second[:250] = first[:250]
    merged([first, second])
    assert passes[0] is Precision.SINGLE
    passes.clear()
    second = first.clone()
    second[:5] = drawn(5, 40, seed=1)
    merged([first, second])
    assert passes == [Precision.SINGLE]
    passes.clear()
    third = first.clone()
    third[:2] = drawn(2, 40, seed=4) * 0.01
    second[:2] = drawn(2, 40, seed=5) * 0.01
    first[:2] *= 0.01
    merged([first, second, third])
    assert passes == [Precision.SINGLE, Precision.DOUBLE]


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e20, 1e30])
def test_products_beyond_the_range_of_float32(scale, passes):
    tensors = [drawn(300, 40, seed=seed) * scale for seed in range(3)]
    result, _ = merged(tensors)
    assert passes[-1] is Precision.DOUBLE
    assert torch.equal(result, karcher_mean(tensors)[0])


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("based", [False, True])
def test_a_merge_for_its_output_differs_by_no_more_than_rounding(granularity, based, passes):
    tensors = [drawn(300, 700, seed=seed) for seed in range(4)]
    base = drawn(300, 700, seed=8) if based else None
    result, _ = merged(tensors, base=base, granularity=granularity)
    assert passes == [Precision.SINGLE]
    expected, _ = karcher_mean(tensors, base=base, granularity=granularity)
    scale = sum(tensor.float().abs() for tensor in (*tensors, *(() if base is None else (base,))))
    assert (
        (result.float() - expected.float()).abs() <= torch.finfo(torch.bfloat16).eps * scale
    ).all()
    assert (result != expected).float().mean() < 0.01


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_still_refused(value, passes):
    tensors = [drawn(300, 40, seed=seed) for seed in range(2)]
    tensors[1][200, 3] = value
    with pytest.raises(KarcherError, match="input 1"):
        merged(tensors)


def test_opposite_and_zero_inputs_are_told_as_before(passes):
    first = drawn(300, 40)
    for tensors in (
        [first, -first],
        [first, torch.zeros_like(first)],
        [torch.zeros_like(first)] * 2,
    ):
        result, solution = merged(tensors)
        expected, exact = karcher_mean(tensors)
        assert torch.equal(result, expected)
        assert solution.mean.status is exact.status
    assert Precision.DOUBLE in passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_inputs_are_never_multiplied_in_float32(dtype, passes):
    """One product of float32 values rounds by as much as half a unit of a float32 output."""
    merged([drawn(300, 40, dtype=dtype, seed=seed) for seed in range(2)])
    assert Precision.SINGLE not in passes
