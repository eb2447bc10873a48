"""Norms, angles and lengths of few vectors against 80-bit sums over the vectors themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inputs import ambient_mean, cap
from wide import WIDE, angle, norm

from mergekit_karcher.kernels.gram import Precision, grams
from mergekit_karcher.means.inputs import checked_inputs
from mergekit_karcher.means.products import products_of
from mergekit_karcher.report.observation import observed
from mergekit_karcher.sphere.pairwise import (
    as_seen_from,
    geometry_of_differences,
    geometry_of_gram,
    joined,
)


def angles(vectors):
    return np.array([[angle(p, q) for q in vectors] for p in vectors])


def sphere(vectors):
    (gram,), (exponents,) = grams([torch.as_tensor(v) for v in vectors], precision=Precision.EXACT)
    return geometry_of_gram(gram, exponents)


def observation_of(vectors, base=None, dtype=torch.float64):
    tensors = [torch.as_tensor(v, dtype=dtype) for v in vectors]
    names = [f"m{index}" for index in range(len(tensors))]
    given = None if base is None else torch.as_tensor(base, dtype=dtype)
    inputs = checked_inputs("w", tensors, names, [1.0] * len(names), base=given)
    products = products_of(inputs, with_base=True)
    return observed(inputs, products, names, None if base is None else "base")


@pytest.mark.parametrize("radius", [1e-8, 1e-6, 1e-4, 1e-2, 0.5, 1.5])
@pytest.mark.parametrize("count", [2, 5])
def test_angles_are_right_down_to_a_hundred_millionth(radius, count):
    vectors = cap(np.random.default_rng(1), count, 3000, radius)
    observation = observation_of(vectors)
    np.testing.assert_allclose(observation.zero.angles, angles(vectors), rtol=1e-7, atol=0)
    np.testing.assert_allclose(
        observation.zero.norms, [float(norm(v)) for v in vectors], rtol=1e-14
    )


@pytest.mark.parametrize("distance", [1e-7, 1e-5, 1e-3, 0.3])
def test_angles_around_a_base_and_from_zero_come_from_one_pass(distance):
    rng = np.random.default_rng(2)
    base = rng.standard_normal(4000)
    steps = [distance * rng.standard_normal(4000) for _ in range(3)]
    vectors = [base + step for step in steps]
    observation = observation_of(vectors, base)
    assert observation.models == ("m0", "m1", "m2", "base")
    np.testing.assert_allclose(
        observation.zero.angles, angles([*vectors, base]), rtol=2e-7, atol=1e-15
    )
    tasks = [np.asarray(v, WIDE) - base for v in vectors]
    np.testing.assert_allclose(observation.base.angles[:3, :3], angles(tasks), rtol=1e-6, atol=0)
    np.testing.assert_allclose(
        observation.base.norms[:3], [float(norm(t)) for t in tasks], rtol=1e-7
    )
    assert np.isnan(observation.base.norms[3])


def test_two_fine_tunes_close_to_each_other_and_far_from_their_base():
    """Their chord is lost in the inner products of both origins."""
    rng = np.random.default_rng(3)
    base, step = rng.standard_normal((2, 5000))
    first = base + step
    second = first + 1e-8 * rng.standard_normal(5000)
    expected = angle(first, second)
    assert 1e-9 < expected < 1e-7
    for observation in (observation_of([first, second], base), observation_of([first, second])):
        assert observation.zero.angles[0, 1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("radius", [1e-3, 0.8, 1.4])
def test_lengths_chords_and_angles_of_combinations(radius):
    rng = np.random.default_rng(5)
    vectors = cap(rng, 4, 500, radius)
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    geometry = sphere(vectors)
    linear = shares @ np.array(vectors)
    expected = norm(linear) / (shares @ [float(norm(v)) for v in vectors])
    assert geometry.linear_length(shares) == pytest.approx(float(expected), rel=1e-12)
    mean = ambient_mean(vectors, shares)
    coefficients = np.linalg.lstsq(np.array(vectors).T, mean, rcond=None)[0]
    expected = [angle(v, mean) for v in vectors]
    np.testing.assert_allclose(geometry.angles_to(coefficients), expected, rtol=1e-6)
    chord = 2 * np.sin(angle(mean, linear) / 2)
    assert geometry.chord_between(coefficients, shares) == pytest.approx(chord, rel=1e-5, abs=1e-12)


def test_parts_join_to_the_whole_and_a_part_that_is_missing_does_not_count():
    rng = np.random.default_rng(6)
    parts = [cap(rng, 3, size, 0.02) for size in (70, 300, 50)]
    whole = [np.concatenate([part[index] for part in parts]) for index in range(3)]
    geometry = joined([sphere(part) for part in parts])
    np.testing.assert_allclose(geometry.angles, angles(whole), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(geometry.norms, [float(norm(v)) for v in whole], rtol=1e-12)
    lone = sphere(parts[1][:2]).among(np.array([0, 1]), 3)
    without = joined([sphere(parts[0]), lone])
    pair = [np.concatenate([parts[0][index], parts[1][index]]) for index in range(2)]
    assert without.angles[0, 1] == pytest.approx(angle(*pair), rel=1e-9)
    assert without.angles[0, 2] == pytest.approx(angle(parts[0][0], parts[0][2]), rel=1e-9)


def test_seen_from_one_of_them():
    rng = np.random.default_rng(7)
    vectors = cap(rng, 4, 200, 0.3)
    geometry = as_seen_from(sphere(vectors), 2)
    others = [0, 1, 3]
    tasks = [np.asarray(vectors[index], WIDE) - vectors[2] for index in others]
    np.testing.assert_allclose(geometry.angles[np.ix_(others, others)], angles(tasks), atol=1e-9)
    assert np.isnan(geometry.norms[2])


def test_equal_vectors_and_zeros():
    vector = np.arange(1.0, 9)
    observation = observation_of([vector, vector, 0 * vector], vector)
    assert observation.zero.angles[0, 1] == 0
    assert np.isnan(observation.zero.angles[0, 2])
    assert observation.base.norms.tolist()[:2] == [0, 0]
    assert observation.base.norms[2] == pytest.approx(float(norm(vector)))


def test_magnitudes_at_the_edge_of_float64():
    rng = np.random.default_rng(8)
    vectors = cap(rng, 3, 100, 0.4)
    huge = observation_of([1e155 * v for v in vectors])
    np.testing.assert_allclose(huge.zero.angles, angles(vectors), rtol=1e-9, atol=1e-12)


def test_differences_need_no_second_product():
    rng = np.random.default_rng(9)
    vectors, base = cap(rng, 3, 64, 0.5), rng.standard_normal(64)
    differences = [*(v - base for v in vectors), base]
    gram = np.array(differences, WIDE) @ np.array(differences, WIDE).T
    geometry = geometry_of_differences(gram, np.zeros(4, np.int64))
    np.testing.assert_allclose(geometry.angles, angles([*vectors, base]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("stored", "roundoff"),
    [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-24)],
)
def test_the_dtype_of_a_file_is_seen_after_a_cast(stored, roundoff):
    vectors = [torch.randn(200, 30).to(stored).float().numpy() for _ in range(2)]
    assert observation_of(vectors, dtype=torch.float32).roundoffs.tolist() == [roundoff, roundoff]
