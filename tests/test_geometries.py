"""Every granularity and origin: what must hold for each, against plain formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import ambient_mean
from mergekit.merge_methods import get, merge_state_dicts
from mergekit.merge_methods.base import PerGroupValues
from scipy.optimize import nnls

from mergekit_karcher import KarcherError, Status, karcher_mean
from mergekit_karcher.sphere.uniqueness import in_open_hemisphere

GRANULARITIES = ["tensor", "row", "model"]
ORIGINS = ["zero", "base"]
MAGNITUDES = ["arithmetic", "linear", "geometric"]
SHAPES = {"weight": (5, 12), "norm": (9,), "kernel": (3, 4, 2, 2)}

every = pytest.mark.parametrize(
    ("granularity", "origin"), list(itertools.product(GRANULARITIES, ORIGINS))
)
seeds = st.integers(0, 2**32 - 1)


def models(seed, count, spread=0.6, dtype=torch.float64, shapes=SHAPES):
    """Fine-tunes of one random model, each with its own length."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return {n: torch.randn(s, generator=generator).double() for n, s in shapes.items()}

    centre = draw()
    return [
        {n: ((centre[n] + spread * t) * (0.5 + index)).to(dtype) for n, t in draw().items()}
        for index in range(count)
    ]


def merged(inputs, weights=None, *, base=None, dtype=None, **parameters):
    """By mergekit's in-memory API, with the base as the last model."""
    given_inputs = inputs if base is None else [*inputs, base]
    weights = [1.0] * len(inputs) if weights is None else list(weights)
    return merge_state_dicts(
        given_inputs,
        "karcher",
        parameters={"weight": weights + [1.0] * (base is not None), **parameters},
        base=None if base is None else len(inputs),
        dtype=dtype,
    )


def options(granularity, origin, seed=99):
    """Parameters of one combination, with a base where it needs one."""
    base = models(seed, 1)[0] if origin == "base" else None
    return {"granularity": granularity, "origin": origin, "base": base}


def vectors(model, granularity):
    """The float64 vectors that each live on a sphere of their own."""
    if granularity == "model":
        return [np.concatenate([model[n].double().numpy().ravel() for n in SHAPES])]
    if granularity == "tensor":
        return [model[n].double().numpy().ravel() for n in SHAPES]
    rows = []
    for name in SHAPES:
        matrix = model[name].double().numpy()
        rows += [row.ravel() for row in (matrix if matrix.ndim > 1 else [matrix])]
    return rows


def on_each(function, inputs, granularity, base=None):
    """A function of N vectors, on every sphere, around zero or around the base."""
    origin = vectors(base, granularity) if base is not None else itertools.repeat(0.0)
    columns = zip(*(vectors(model, granularity) for model in inputs), strict=True)
    pairs = zip(columns, origin, strict=base is not None)
    return [function([v - o for v in column]) + o for column, o in pairs]


def length(magnitude, group, shares):
    norms = np.array([np.linalg.norm(v) for v in group])
    if magnitude == "linear":
        return np.linalg.norm(shares @ np.array(group))
    return shares @ norms if magnitude == "arithmetic" else np.exp(shares @ np.log(norms))


@every
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_every_combination_equals_the_plain_mean_of_its_vectors(granularity, origin, magnitude):
    inputs, weights = models(1, 4), np.array([1.0, 0.3, 2.0, 0.7])
    shares = weights / weights.sum()
    choice = options(granularity, origin)

    def plain(group):
        direction = ambient_mean(group, weights)
        return direction / np.linalg.norm(direction) * length(magnitude, group, shares)

    found = merged(inputs, weights, magnitude=magnitude, **choice)
    expected = on_each(plain, inputs, granularity, choice["base"])
    for own, other in zip(vectors(found, granularity), expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-13 * np.abs(other).max())


@every
@settings(deadline=None, max_examples=15)
@given(seed=seeds, share=st.floats(0.05, 0.95))
def test_two_models_give_slerp(granularity, origin, seed, share):
    """Shoemake 1985, on every sphere."""
    inputs, choice = models(seed, 2), options(granularity, origin)

    def slerp(pair):
        first, second = pair
        p, q = first / np.linalg.norm(first), second / np.linalg.norm(second)
        angle = 2 * np.arctan2(np.linalg.norm(p - q), np.linalg.norm(p + q))
        x = (np.sin((1 - share) * angle) * p + np.sin(share * angle) * q) / np.sin(angle)
        return x * ((1 - share) * np.linalg.norm(first) + share * np.linalg.norm(second))

    found = merged(inputs, [1 - share, share], **choice)
    expected = on_each(slerp, inputs, granularity, choice["base"])
    for own, other in zip(vectors(found, granularity), expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-12 * np.abs(other).max())


@every
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_one_model_is_its_own_mean(granularity, origin, magnitude, dtype):
    (model,) = models(2, 1, dtype=dtype)
    choice = options(granularity, origin)
    if origin == "base":
        choice["base"] = {name: tensor.to(dtype) for name, tensor in choice["base"].items()}
    found = merged([model], [0.3], magnitude=magnitude, **choice)
    for name, tensor in model.items():
        assert torch.equal(found[name], tensor)


@every
@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_the_order_of_the_models_does_not_matter(granularity, origin, seed):
    rng = np.random.default_rng(seed)
    inputs, weights, choice = models(seed, 5), rng.uniform(0.1, 2, 5), options(granularity, origin)
    order = rng.permutation(5)
    first = merged(inputs, weights, **choice)
    second = merged([inputs[index] for index in order], weights[order], **choice)
    for name in SHAPES:
        torch.testing.assert_close(first[name], second[name], rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_equal_models_give_that_model(granularity, origin, magnitude):
    (model,) = models(3, 1)
    found = merged([model] * 6, range(1, 7), magnitude=magnitude, **options(granularity, origin))
    for name in SHAPES:
        torch.testing.assert_close(found[name], model[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("origin", ORIGINS)
def test_granularities_agree_where_their_spheres_are_the_same(origin):
    """A model of one tensor of one row is one vector, whatever one calls it."""
    shapes = {"weight": (1, 40)}
    inputs = models(4, 3, shapes=shapes)
    base = models(5, 1, shapes=shapes)[0] if origin == "base" else None
    found = [
        merged(inputs, granularity=granularity, origin=origin, base=base)["weight"]
        for granularity in GRANULARITIES
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@every
def test_near_collinear_models_give_the_linear_mean(granularity, origin):
    """Paper, 5.2: to first order in the angle the sphere is flat."""
    choice = options(granularity, origin)
    base = choice["base"] or {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    centre, *noises = models(6, 5)
    inputs = [{n: base[n] + centre[n] * (1 + 1e-5 * noise[n]) for n in SHAPES} for noise in noises]
    found = merged(inputs, **choice)
    for name in SHAPES:
        linear = torch.stack([model[name] for model in inputs]).mean(0)
        torch.testing.assert_close(found[name], linear, rtol=0, atol=1e-9)


@every
def test_orthogonal_models_keep_their_length(granularity, origin):
    """Paper, 5.3: the linear mean of N orthogonal vectors of one length is sqrt(N) shorter."""
    choice = options(granularity, origin)
    base = choice["base"] or {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    inputs = []
    for index in range(4):
        steps = {n: torch.zeros(s).double() for n, s in SHAPES.items()}
        for step in steps.values():
            step.flatten(1 if step.ndim > 1 else 0)[..., index] = 3.0
        inputs.append({n: base[n] + steps[n] for n in SHAPES})
    found = merged(inputs, **choice)
    for name in SHAPES:
        moved = found[name] - base[name]
        mean = torch.stack([model[name] for model in inputs]).mean(0) - base[name]
        torch.testing.assert_close(moved, 2 * mean, rtol=1e-12, atol=1e-13)


@every
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_gradients_match_finite_differences(granularity, origin, magnitude):
    shapes = {"weight": (3, 4), "norm": (5,)}
    inputs = [
        tensor.clone().requires_grad_()
        for model in models(7, 4 if origin == "base" else 3, shapes=shapes)
        for tensor in model.values()
    ]

    def merge_of(*tensors):
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        found = [dict(zip(shapes, pair, strict=True)) for pair in pairs]
        base = found.pop() if origin == "base" else None
        result = merged(
            found,
            [1.0, 2.0, 0.5],
            granularity=granularity,
            origin=origin,
            magnitude=magnitude,
            base=base,
        )
        return tuple(result.values())

    assert torch.autograd.gradcheck(merge_of, inputs)


@every
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_a_merge_with_a_gradient_step_is_that_step_times_the_weight(
    granularity, origin, magnitude, weight
):
    """Lemma 1 of the notes on merging and the geometry of optimisation: f(t, t) = t and the
    Jacobian of the second argument on the diagonal is A give f(t, t - eta g) = t - eta A g to first
    order. Here A is the weight times the identity, whatever the sphere."""
    choice = options(granularity, origin) | {"magnitude": magnitude}
    theta, gradient = models(8, 1)[0], models(9, 1)[0]
    errors = []
    for eta in (1e-3, 1e-4):
        local = {name: theta[name] - eta * gradient[name] for name in SHAPES}
        found = merged([theta, local], [1 - weight, weight], **choice)
        steps = {n: (found[n] - theta[n]) / eta + weight * gradient[n] for n in SHAPES}
        errors.append(max(float(step.abs().max()) for step in steps.values()))
    assert errors[0] < 0.1
    assert errors[1] < 0.2 * errors[0]

    def of_second(tensor):
        other = theta | {"weight": tensor}
        return merged([theta, other], [1 - weight, weight], **choice)["weight"]

    jacobian = torch.autograd.functional.jacobian(of_second, theta["weight"].clone())
    identity = torch.eye(theta["weight"].numel(), dtype=torch.float64)
    torch.testing.assert_close(
        jacobian.reshape(identity.shape), weight * identity, rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("eta", [0.01, 0.3])
def test_a_gradient_step_is_a_linear_merge_with_its_local_model_and_back(eta):
    """From the same notes, exactly: theta - eta g = (1 - eta) theta + eta (theta - g); and a linear
    merge is a step from the interpolated point, towards the second model."""
    theta, gradient = models(10, 1)[0], models(11, 1)[0]
    local = {name: theta[name] - gradient[name] for name in SHAPES}
    step = merge_state_dicts(
        [theta, local], "linear", parameters={"weight": [1 - eta, eta], "normalize": True}
    )
    for name in SHAPES:
        expected = theta[name] - eta * gradient[name]
        torch.testing.assert_close(step[name], expected, rtol=1e-14, atol=1e-14)
        back = (step[name] - theta[name]) / eta + theta[name]
        torch.testing.assert_close(back, local[name], rtol=1e-11, atol=1e-11)


def test_rows_are_spheres_of_their_own():
    """Scales that differ by 2^900, zeros, opposites and plain rows, in one tensor."""
    rng = np.random.default_rng(12)
    first, second = rng.standard_normal((2, 5, 30))
    scales = np.array([2.0**450, 2.0**-450, 1.0, 1.0, 1.0])[:, None]
    first, second = first * scales, second * scales
    first[2] = second[2] = 0
    second[3] = -2 * first[3]
    pair = [torch.as_tensor(first), torch.as_tensor(second)]
    mean, result = karcher_mean(pair, [1, 3], granularity="row")
    for row in range(5):
        own, alone = karcher_mean([tensor[row] for tensor in pair], [1, 3])
        assert torch.equal(mean[row], own)
        np.testing.assert_array_equal(result.coefficients[row], alone.coefficients)
    assert result.status is Status.NOT_UNIQUE
    assert not result.unique
    np.testing.assert_array_equal(result.coefficients[3], [0.25, 0.75])


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(2, 12), st.integers(1, 4), st.integers(1, 40))
def test_rows_of_few_dimensions_equal_single_tensors(seed, count, size, rows):
    """Dependent inputs: some rows have no mean, some need other starts."""
    rng = np.random.default_rng(seed)
    stack = torch.as_tensor(rng.standard_normal((count, rows, size)))
    mean, result = karcher_mean(list(stack), granularity="row")
    singles = [karcher_mean(list(stack[:, row])) for row in range(rows)]
    for row, (own, _) in enumerate(singles):
        torch.testing.assert_close(mean[row], own, rtol=1e-10, atol=1e-10)
    assert result.unique == all(single.unique for _, single in singles)
    assert result.iterations == max(single.iterations for _, single in singles)


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(2, 10), st.integers(1, 5))
def test_hemispheres_agree_with_scipy(seed, count, size):
    """The distance of the hull from zero, by Lawson and Hanson's solver for one problem."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((20, count, size)) + rng.uniform(0, 2) * np.eye(size)[0]
    points /= np.linalg.norm(points, axis=-1, keepdims=True)
    found = in_open_hemisphere(points @ points.transpose(0, 2, 1))
    for own, rows in zip(found, points, strict=True):
        _, residual = nnls(np.vstack([rows.T, np.ones(count)]), [*[0] * size, 1])
        if not 1e-15 < residual**2 < 1e-12:
            assert own == (residual**2 > 1e-13)


def test_the_largest_of_the_rows_is_told():
    base = torch.eye(6, dtype=torch.float64)[:2]
    other = torch.stack([base[0], torch.tensor([0.6, 0.8, 0, 0, 0, 0], dtype=torch.float64)])
    _, result = karcher_mean([base, other], granularity="row")
    np.testing.assert_allclose(result.angles, np.arccos(0.8) / 2, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("count", [2, 8])
def test_rounded_once(dtype, granularity, based, count):
    """Within one unit in the last place of the sum of magnitudes, of the mean of what arrived."""
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(6, 200, generator=generator)
    inputs = [
        (base + 0.01 * torch.randn(6, 200, generator=generator)).to(dtype) for _ in range(count)
    ]
    base = base.to(dtype)
    origin = base if based else None
    mean, result = karcher_mean(inputs, base=origin, granularity=granularity)
    wide = [tensor.double().numpy() for tensor in inputs]
    start = base.double().numpy() if based else np.zeros((6, 200))
    parts = range(6) if granularity == "row" else [slice(None)]
    for part in parts:
        differences = [(tensor[part] - start[part]).ravel() for tensor in wide]
        exact = ambient_mean(differences, [1] * count) + start[part].ravel()
        k = np.atleast_2d(result.coefficients)[part if granularity == "row" else 0]
        size = np.abs(start[part]).ravel() + np.abs(k) @ np.abs(np.array(differences))
        error = np.abs(mean[part].double().numpy().ravel() - exact)
        assert (error <= torch.finfo(dtype).eps * size).all()


def test_magnitudes_of_opposites_and_zeros():
    """Linear falls to nothing between orthogonal opposites; geometric is zero with one zero."""
    first, second = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 1.0])
    for magnitude, expected in (("arithmetic", 2.5), ("geometric", 2.0), ("linear", 17**0.5 / 2)):
        mean, _ = karcher_mean([first, second], magnitude=magnitude)
        torch.testing.assert_close(mean, torch.full((2,), expected / 2**0.5))
    zero = torch.zeros(2)
    assert torch.equal(karcher_mean([first, zero], magnitude="geometric")[0], zero)
    torch.testing.assert_close(karcher_mean([first, zero], magnitude="linear")[0], first / 2)


def test_the_groups_of_a_call_are_the_whole_model_and_ties_and_buffers_count_once():
    """Tied tensors share their memory in every input; integer buffers are copied by mergekit."""
    plain = models(13, 3)
    tied = [model | {"head": model["weight"], "steps": torch.tensor(7)} for model in plain]
    expected, found = (merged(m, granularity="model") for m in (plain, tied))
    for name in SHAPES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-14, atol=1e-14)
    assert torch.equal(found["head"], found["weight"])
    assert found["steps"] == 7
    copied = [model | {"head": model["weight"].clone()} for model in plain]
    assert not torch.equal(merged(copied, granularity="model")["norm"], expected["norm"])


def test_calls_with_mixed_granularities_or_weights_are_refused():
    inputs = models(14, 2)
    mixed = PerGroupValues(["model", "row", "model"])
    with pytest.raises(KarcherError, match="both granularity: model and granularity: row"):
        merged(inputs, granularity=mixed)
    weights = PerGroupValues([[1, 1], [1, 2], [1, 1]])
    with pytest.raises(KarcherError, match="different weights of a model"):
        merge_state_dicts(inputs, "karcher", parameters={"granularity": "model", "weight": weights})
    with pytest.raises(KarcherError, match=r"origin: base needs .* weight"):
        merged(inputs, origin="base")
    with pytest.raises(KarcherError, match="granularity is 'columns': give tensor, row or model"):
        merged(inputs, granularity="columns")
    with pytest.raises(KarcherError, match=r"origin is '/tmp/base': .*name of a stage"):
        merged(inputs, origin="/tmp/base")
    with pytest.raises(KarcherError, match="granularity is 'model': give tensor or row"):
        karcher_mean([torch.ones(2)], granularity="model")
    with pytest.raises(KarcherError, match="magnitude is 'max'"):
        karcher_mean([torch.ones(2)], magnitude="max")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("spoiled", ["input", "base"])
def test_a_value_that_is_not_finite_is_named(granularity, spoiled):
    inputs, base = models(15, 2), models(16, 1)[0]
    (inputs[1] if spoiled == "input" else base)["weight"][2, 3] = torch.nan
    label = "1" if spoiled == "input" else "base"
    with pytest.raises(KarcherError, match=rf"weight of {label} is not finite .* at \[2, 3\]"):
        merged(inputs, granularity=granularity, origin="base", base=base)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_base_of_another_scale(granularity):
    """Squares of the differences, and of the inputs scaled as they would need, leave float64."""
    first, second, base = torch.randn(3, 4, 20, dtype=torch.float64)
    for power, other in ((-500, 500), (500, -500)):
        inputs = [first * 2.0**power, second * 2.0**power]
        around = base * 2.0**other
        mean, result = karcher_mean(inputs, base=around, granularity=granularity)
        differences = [tensor - around for tensor in inputs]
        expected, _ = karcher_mean(differences, granularity=granularity)
        assert result.converged
        torch.testing.assert_close(
            mean * 2.0**-500, (around + expected) * 2.0**-500, rtol=1e-13, atol=1e-13
        )


def test_a_base_of_another_shape_is_named():
    with pytest.raises(KarcherError, match=r"the base has shape \(4,\)"):
        karcher_mean([torch.ones(3)], base=torch.ones(4))


@pytest.mark.parametrize("elements", [20, 50])
def test_gradients_of_many_blocks_of_rows(monkeypatch, elements):
    """With 50, as many rows fit into a block forwards as would not with the upstream gradient."""
    monkeypatch.setattr("mergekit_karcher.means.solve._ROW_ELEMENTS", elements)
    inputs = [torch.randn(7, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *t: karcher_mean(t, granularity="row")[0], inputs)


def test_both_names_have_every_parameter():
    for name in ("karcher", "karcher_mean"):
        known = [parameter.name for parameter in get(name).spec.parameters]
        shared = ["granularity", "origin", "magnitude", "floor", "max_iter", "tol", "left_out"]
        assert known == ["weight", "metric", *shared]


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_padding_fills_up_with_zeros_at_the_end_of_each_axis(granularity):
    """Paper, 6.2: what is merged are the tensors as numpy.pad would make them."""
    shapes = [(4, 7), (6, 5), (6, 7)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    plain = [
        torch.as_tensor(np.pad(t.detach().numpy(), [(0, 6 - t.shape[0]), (0, 7 - t.shape[1])]))
        for t in tensors
    ]
    found, result = karcher_mean(tensors, [1, 2, 3], granularity=granularity, pad=True)
    expected, same = karcher_mean(plain, [1, 2, 3], granularity=granularity)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    np.testing.assert_array_equal(result.coefficients, same.coefficients)
    found.sum().backward()
    assert [t.grad.shape for t in tensors] == [torch.Size(shape) for shape in shapes]
    base = torch.zeros(1, 1, dtype=torch.float64)
    around, _ = karcher_mean(tensors, [1, 2, 3], base=base, granularity=granularity, pad=True)
    torch.testing.assert_close(around, found)
    with pytest.raises(KarcherError, match="The tensors have 1 and 2 axes"):
        karcher_mean([torch.ones(3), torch.ones(3, 3)], pad=True)
