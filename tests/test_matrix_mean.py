"""Means in matrix metrics: the equations, the limits, and a plain reference in 50 digits."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from mergekit_karcher import InputGram, fisher_mean, karcher_mean
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.means.inputs import checked_inputs
from mergekit_karcher.means.matrix_mean import matrix_mean

mp.dps = 50

OUT, IN = 5, 7


def random_layers(seed, count=3, shape=(OUT, IN), spread=1.0):
    """Layers, and for each the Gram of as many inputs as it has columns, and weights."""
    rng = np.random.default_rng(seed)
    layers = rng.standard_normal((count, *shape))
    inputs = rng.standard_normal((count, shape[-1], shape[-1]))
    inputs *= np.exp(spread * rng.standard_normal((count, 1, shape[-1])))
    grams = inputs.transpose(0, 2, 1) @ inputs
    return layers, grams, rng.uniform(0.1, 3, count)


def dense(grams):
    return [InputGram(dense=torch.as_tensor(gram)) for gram in grams]


def merged(layers, grams, weights=None, **options):
    tensors = [torch.as_tensor(layer) for layer in layers]
    metrics = grams if isinstance(grams, str) else dense(grams)
    return fisher_mean(tensors, metrics, weights, **options).numpy()


def linear(layers, weights):
    return np.tensordot(weights, layers, 1) / np.sum(weights)


def j(w, layers, grams, weights, ridge):
    """The objective as it is written, by traces."""
    total = sum(
        weight * np.trace((w - layer) @ gram @ (w - layer).T)
        for weight, layer, gram in zip(weights, layers, grams, strict=True)
    )
    level = np.mean(np.diag(np.tensordot(weights, grams, 1)))
    return total + ridge * level * ((w - linear(layers, weights)) ** 2).sum()


def reference(layers, grams, weights, ridge):
    """Row by row from the normal equations, in 50 digits, from no difference but the given."""
    width = len(grams[0])
    summed = mp.matrix(width)
    for gram, weight in zip(grams, weights, strict=True):
        summed += mpf(float(weight)) * mp.matrix(gram.tolist())
    level = mpf(float(ridge)) * sum(summed[i, i] for i in range(width)) / width
    total = sum(mpf(float(weight)) for weight in weights)
    rows = []
    for row in range(layers[0].shape[0]):
        right = mp.matrix(width, 1)
        for layer, gram, weight in zip(layers, grams, weights, strict=True):
            vector = mp.matrix(layer[row].tolist())
            right += mpf(float(weight)) * (
                mp.matrix(gram.tolist()) * vector + level * vector / total
            )
        solved = mp.lu_solve(summed + level * mp.eye(width), right)
        rows.append([float(x) for x in solved])
    return np.array(rows)


def of_changes(layers, base):
    changes = [layer - base for layer in layers]
    return np.array([change.T @ change / (change**2).sum() for change in changes])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.01, 0.3, 10.0]))
def test_the_answer_is_that_of_the_normal_equations(seed, ridge):
    layers, grams, weights = random_layers(seed)
    expected = reference(layers, grams, weights, ridge)
    found = merged(layers, grams, weights, ridge=ridge)
    assert np.linalg.norm(found - expected) <= 1e-9 * np.linalg.norm(expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_gradient_of_j_is_zero_there_and_nothing_near_it_is_lower(seed, ridge):
    layers, grams, weights = random_layers(seed, spread=0.3)
    found = merged(layers, grams, weights, ridge=ridge)
    least = j(found, layers, grams, weights, ridge)
    rng = np.random.default_rng(seed)
    for _ in range(5):
        step = rng.standard_normal(found.shape)
        step *= 1e-4 / np.linalg.norm(step)
        above, below = (j(found + s * step, layers, grams, weights, ridge) for s in (1, -1))
        assert above > least
        assert below > least
        # The slope by central differences; J is quadratic, so they are exact but for rounding.
        assert abs(above - below) < 1e-11 * least


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
def test_changes_are_metrics_without_data(shape, ridge):
    layers, _, weights = random_layers(1, shape=shape)
    base = np.random.default_rng(2).standard_normal(shape)
    expected = reference(layers, of_changes(layers, base), weights, ridge)
    found = merged(layers, "self", weights, base=torch.as_tensor(base), ridge=ridge)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def low_rank_changes(base, rank):
    rng = np.random.default_rng(rank)
    outputs, inputs = base.shape
    ups, downs = rng.standard_normal((3, outputs, rank)), rng.standard_normal((3, rank, inputs))
    return base + 0.1 * ups @ downs


@pytest.mark.parametrize("shape", [(300, 290), (70, 230)])
def test_the_ridge_of_changes_of_low_rank_is_a_part_of_the_eigenvalues_that_are_there(shape):
    """Of 3 changes of rank 1, 3 eigenvalues are there, and their mean, weighted by themselves."""
    base = np.random.default_rng(2).standard_normal(shape)
    layers, weights = low_rank_changes(base, 1), [1.0, 2.0, 0.5]
    grams = of_changes(layers, base)
    eigenvalues = np.linalg.eigvalsh(np.tensordot(weights, grams, 1))[-3:]
    mean = (eigenvalues**2).sum() / eigenvalues.sum()
    w = merged(layers, "self", weights, base=torch.as_tensor(base))
    pulled = linear(layers, weights)
    slope = sum(k * (w - layer) @ a for k, layer, a in zip(weights, layers, grams, strict=True))
    np.testing.assert_allclose(slope, 0.3 * mean * (pulled - w), rtol=1e-8, atol=1e-10)


def test_changes_of_low_rank_are_counted_and_others_are_not():
    base = np.random.default_rng(2).standard_normal((300, 290))
    changed = np.random.default_rng(3).standard_normal((3, *base.shape))
    for layers, low_rank in ((low_rank_changes(base, 1), 1), (base + changed, 0)):
        tensors = [torch.as_tensor(layer) for layer in layers]
        inputs = checked_inputs("w", tensors, base=torch.as_tensor(base))
        assert matrix_mean(inputs, 0.3).low_rank == low_rank


def test_changes_of_orthogonal_inputs_are_added():
    """Two tasks that saw different inputs: the answer for each is its own layer on its inputs."""
    base = np.random.default_rng(3).standard_normal((6, 8))
    changes = np.zeros((2, 6, 8))
    changes[0, :, :3] = np.random.default_rng(4).standard_normal((6, 3))
    changes[1, :, 3:6] = np.random.default_rng(5).standard_normal((6, 3))
    found = merged(base + changes, "self", base=torch.as_tensor(base), ridge=1e-9)
    np.testing.assert_allclose(found, base + changes.sum(0), rtol=1e-6, atol=1e-6)


def test_translation_scale_order_and_equal_metrics():
    layers, grams, weights = random_layers(6, count=4)
    found = merged(layers, grams, weights)
    shift = np.random.default_rng(7).standard_normal((OUT, IN))
    close = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(merged(layers + shift, grams, weights), found + shift, **close)
    np.testing.assert_allclose(merged(layers, grams * 1e-24, weights), found, **close)
    np.testing.assert_allclose(merged(layers, grams, weights * 7), found, **close)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(merged(layers[order], grams[order], weights[order]), found, **close)
    same = merged(layers, grams[[0] * 4], weights)
    np.testing.assert_allclose(same, linear(layers, weights), **close)
    base = torch.as_tensor(shift)
    twice = merged(3 * layers - 2 * shift, "self", weights, base=base)
    once = merged(layers, "self", weights, base=base)
    np.testing.assert_allclose(twice - shift, 3 * (once - shift), **close)


def test_diagonal_grams_are_diagonal_metrics():
    layers, _, weights = random_layers(8)
    diagonals = np.random.default_rng(9).uniform(0.1, 5, (3, IN))
    metrics = [torch.as_tensor(np.tile(d, (OUT, 1))) for d in diagonals]
    tensors = [torch.as_tensor(layer) for layer in layers]
    expected = fisher_mean(tensors, metrics, weights, floor=0).numpy()
    found = merged(layers, [np.diag(d) for d in diagonals], weights, ridge=0)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_factors_are_their_product():
    layers, _, weights = random_layers(10)
    rng = np.random.default_rng(11)
    factors, diagonals = rng.standard_normal((3, 4, IN)), rng.uniform(0, 1, (3, IN))
    given_ = [
        InputGram(factor=torch.as_tensor(f), diagonal=torch.as_tensor(d))
        for f, d in zip(factors, diagonals, strict=True)
    ]
    grams = factors.transpose(0, 2, 1) @ factors + np.array([np.diag(d) for d in diagonals])
    found = fisher_mean([torch.as_tensor(layer) for layer in layers], given_, weights).numpy()
    np.testing.assert_allclose(found, merged(layers, grams, weights), rtol=1e-10, atol=1e-12)
    assert given_[0].trace() == pytest.approx(np.trace(grams[0]))


@pytest.mark.parametrize("shape", [(2, 9), (3, 10), (1, 2), (3, 9)])
@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_few_rows_and_many_inputs(shape, ridge):
    """Below as many inputs as rows in all models a smaller system is solved, with one answer."""
    layers, _, weights = random_layers(24, shape=shape)
    base = np.random.default_rng(25).standard_normal(shape)
    expected = reference(layers, of_changes(layers, base), weights, ridge)
    found = merged(layers, "self", weights, base=torch.as_tensor(base), ridge=ridge)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)
    factors = np.random.default_rng(26).standard_normal((3, *shape))
    given_ = [InputGram(factor=torch.as_tensor(f)) for f in factors]
    expected = reference(layers, factors.transpose(0, 2, 1) @ factors, weights, ridge)
    found = fisher_mean([torch.as_tensor(layer) for layer in layers], given_, weights, ridge=ridge)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_the_papers_example_in_axes_turned_by_45_degrees():
    """J of the linear mean is 50.5 and that of the best point 1.98, in full matrices as well."""
    turn = np.array([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
    grams = np.array([turn @ np.diag(d) @ turn.T for d in ([100.0, 1.0], [1.0, 100.0])])
    assert abs(grams[0][0, 1]) > 49
    layers = np.array([[[0.0, 0.0]], [turn @ [1.0, 1.0]]])
    found = merged(layers, grams, ridge=0)
    assert f"{j(found, layers, grams, [1, 1], 0):.2f}" == "1.98"
    assert f"{j(layers.mean(0), layers, grams, [1, 1], 0):.1f}" == "50.5"


def test_one_model_and_equal_models_are_that_model():
    layers, grams, _ = random_layers(12)
    base = torch.zeros(OUT, IN, dtype=torch.float64)
    np.testing.assert_array_equal(merged(layers[:1], grams[:1]), layers[0])
    np.testing.assert_array_equal(merged(layers[:1], "self", base=base), layers[0])
    equal = np.array([layers[0]] * 3)
    np.testing.assert_allclose(merged(equal, grams), layers[0], rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(
        merged(equal, "self", [1, 2, 4], base=base), layers[0], rtol=1e-13, atol=1e-15
    )


def test_an_unchanged_layer_has_no_weight():
    layers, grams, weights = random_layers(13)
    base = torch.as_tensor(layers[1])
    rest = [0, 2]
    expected = merged(layers[rest], "self", weights[rest], base=base)
    np.testing.assert_array_equal(merged(layers, "self", weights, base=base), expected)
    np.testing.assert_array_equal(merged(layers[[1, 1, 2]], "self", base=base), layers[2])
    np.testing.assert_array_equal(merged(layers[[1, 1]], "self", base=base), layers[1])
    expected = merged(layers[rest], grams[rest], weights[rest])
    grams[1] = 0
    np.testing.assert_array_equal(merged(layers, grams, weights), expected)


def test_no_metric_anywhere_is_the_linear_mean(caplog):
    layers, grams, weights = random_layers(14)
    found = merged(layers, 0 * grams, weights, name="w")
    np.testing.assert_allclose(found, linear(layers, weights), rtol=1e-13, atol=1e-15)
    assert "The metrics of w are zero in every model" in caplog.text


@pytest.mark.parametrize("scale", [1e-180, 1e180])
def test_grams_too_small_or_too_large_to_square(scale):
    layers, grams, weights = random_layers(27)
    found = merged(layers, grams * scale, weights)
    np.testing.assert_allclose(found, merged(layers, grams, weights), rtol=1e-9)


def test_what_cannot_be_solved_is_the_linear_mean_and_counted(caplog):
    layers, _, weights = random_layers(15)
    flat = np.zeros((3, IN, IN))
    flat[:, 0, 0] = 1
    with caplog.at_level(logging.WARNING):
        found = merged(layers, flat, weights, ridge=0, name="w")
    np.testing.assert_allclose(found, linear(layers, weights), rtol=1e-13, atol=1e-15)
    assert "w cannot be solved" in caplog.text
    stacks = [torch.as_tensor(np.stack([layer, layer])) for layer in layers]
    grams = [InputGram(dense=torch.as_tensor(np.stack([f, np.eye(IN)]))) for f in flat]
    assert matrix_mean(checked_inputs("w", stacks, metrics=grams), 0.0).unsolved == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("condition", [1e0, 1e4, 1e8])
def test_precision_over_conditions(dtype, condition):
    """At most one unit of 16 bits in the last place, and 1e-6 of the whole in float32."""
    rng = np.random.default_rng(16)
    layers, grams = [], []
    for _ in range(3):
        turn, _ = np.linalg.qr(rng.standard_normal((IN, IN)))
        grams.append(turn @ np.diag(np.geomspace(1, 1 / condition, IN)) @ turn.T)
        layers.append(torch.as_tensor(rng.standard_normal((OUT, IN))).to(dtype))
    grams[1:] = [grams[0] * 0.5 + 0.1 / condition * gram for gram in grams[1:]]
    weights = [1.0, 2.0, 3.0]
    assert np.linalg.cond(np.tensordot(weights, grams, 1)) > condition / 4
    found = fisher_mean(layers, dense(grams), weights, ridge=0)
    exact = reference([layer.double().numpy() for layer in layers], grams, weights, 0.0)
    assert found.dtype == dtype
    error = np.abs(found.double().numpy() - exact)
    if dtype is torch.float32:
        assert np.linalg.norm(error) < 1e-6 * np.linalg.norm(exact)
    else:
        unit = torch.finfo(dtype).eps * 2.0 ** np.floor(np.log2(np.abs(exact)))
        assert (error <= unit).all()


def test_experts_are_layers_and_convolutions_are_one():
    layers, _, weights = random_layers(17, shape=(2, OUT, IN))
    base = np.random.default_rng(18).standard_normal((2, OUT, IN))
    found = merged(layers, "self", weights, base=torch.as_tensor(base))
    for index in range(2):
        one = merged(layers[:, index], "self", weights, base=torch.as_tensor(base[index]))
        np.testing.assert_array_equal(found[index], one)
    kernels, _, _ = random_layers(19, shape=(OUT, 3, 2, 2))
    around = np.random.default_rng(20).standard_normal((OUT, 3, 2, 2))
    flat = merged(
        kernels.reshape(3, OUT, 12), "self", base=torch.as_tensor(around.reshape(OUT, 12))
    )
    found = merged(kernels, "self", base=torch.as_tensor(around))
    np.testing.assert_array_equal(found, flat.reshape(OUT, 3, 2, 2))
    vectors, _, _ = random_layers(21, shape=(IN,))
    found = merged(vectors, "self", weights, base=torch.zeros(IN, dtype=torch.float64))
    np.testing.assert_allclose(found, linear(vectors, weights), rtol=1e-13, atol=1e-15)


def test_strides_and_changes_too_small_to_square():
    layers, grams, weights = random_layers(22)
    expected = merged(layers, grams, weights)
    strided = [torch.as_tensor(layer.T.copy()).T for layer in layers]
    np.testing.assert_array_equal(fisher_mean(strided, dense(grams), weights).numpy(), expected)
    base = torch.zeros(OUT, IN, dtype=torch.float64)
    found = merged(layers * 1e-150, "self", weights, base=base)
    np.testing.assert_allclose(found * 1e150, merged(layers, "self", weights, base=base), rtol=1e-9)


GRAM = InputGram(dense=torch.eye(IN))
MISTAKES = {
    "other width": ([GRAM, InputGram(dense=torch.eye(3))], {}, r"needs \(7, 7\)"),
    "mixed kinds": ([GRAM, torch.ones(OUT, IN)], {}, "metrics of one kind"),
    "mixed with none": ([GRAM, None], {}, "metrics of one kind"),
    "not finite": ([GRAM, InputGram(dense=torch.full((IN, IN), torch.nan))], {}, "not finite"),
    "ridge": ([GRAM, GRAM], {"ridge": -1.0}, "ridge is -1.0: give a finite fraction"),
    "ridge nan": ([GRAM, GRAM], {"ridge": math.nan}, "ridge is nan"),
    "no base": ("self", {}, "with base="),
    "another word": ("selv", {"base": torch.ones(OUT, IN)}, "metrics='selv'"),
    "base of another shape": ("self", {"base": torch.ones(IN, OUT)}, "has shape"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_sentence(case):
    metrics, options, words = MISTAKES[case]
    with pytest.raises(KarcherError, match=words):
        fisher_mean([torch.rand(OUT, IN), torch.rand(OUT, IN)], metrics, name="w", **options)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"dense": torch.eye(3), "factor": torch.eye(3)},
        {"dense": torch.ones(2, 3)},
        {"dense": torch.eye(3), "diagonal": torch.ones(3)},
        {"factor": torch.ones(2, 3), "diagonal": torch.ones(2)},
        {"factor": torch.ones(3)},
    ],
)
def test_what_is_no_gram_is_refused(parts):
    with pytest.raises(KarcherError, match="Gram"):
        InputGram(**parts)


def test_a_karcher_mean_refuses_grams():
    with pytest.raises(KarcherError, match="give diagonal"):
        karcher_mean([torch.rand(OUT, IN)] * 2, metrics=[GRAM, GRAM])


def test_a_model_that_is_not_finite_is_named():
    layers, grams, _ = random_layers(23)
    layers[1, 2, 3] = np.nan
    with pytest.raises(KarcherError, match="w of b is not finite in 1 of 35 places"):
        merged(layers, grams, labels=["a", "b", "c"], name="w")
    options = {"labels": ["a", "b", "c"], "name": "w", "base": torch.zeros(OUT, IN)}
    with pytest.raises(KarcherError, match="w of b is not finite in 1 of 35 places"):
        merged(layers, "self", **options)
