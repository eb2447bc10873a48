"""The Karcher mean in a metric that the models share: its equations, and real merges."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from configs import config_for
from conftest import llama, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import karcher as slow_karcher
from safetensors.torch import load_file, save_file

from mergekit_karcher import karcher_mean
from mergekit_karcher.cli.main import main
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.kernels import chords, gram
from mergekit_karcher.kernels.chords import squared_chord
from mergekit_karcher.means.autograd import merge_whole
from mergekit_karcher.means.inputs import checked_inputs
from mergekit_karcher.means.products import products_of
from mergekit_karcher.means.solve import Settings
from mergekit_karcher.report.observation import observed
from mergekit_karcher.report.schema import Report
from mergekit_karcher.sphere.results import Status

FLOOR = 1e-6


def problem(seed, count=3, shape=(6, 8), spread=3.0):
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal(shape)
    tensors = [centre + 0.7 * rng.standard_normal(shape) for _ in range(count)]
    metrics = [np.exp(spread * rng.standard_normal(shape)) for _ in range(count)]
    return tensors, metrics, rng.uniform(0.2, 3, count).tolist()


def shared(metrics, weights, floor=FLOOR):
    return sum(w * (g + floor * g.mean()) for w, g in zip(weights, metrics, strict=True))


def mean_of(tensors, metrics, weights=None, **options):
    given = [None if g is None else torch.as_tensor(g) for g in metrics]
    found, result = karcher_mean(
        [torch.as_tensor(t) for t in tensors], weights, metrics=given, **options
    )
    return found.numpy(), result


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["zero", "base"]))
def test_the_gradient_of_the_squared_angles_vanishes_in_the_metric(seed, origin):
    """sum_i w_i log_x(p_i) = 0, the angles, and the length, all under <x, y>_G."""
    tensors, metrics, weights = problem(seed)
    base = 0.1 * tensors[0] if origin == "base" else np.zeros_like(tensors[0])
    given_base = torch.as_tensor(base) if origin == "base" else None
    found, result = mean_of(tensors, metrics, weights, base=given_base)
    g = shared(metrics, weights)

    def product(x, y):
        return (g * x * y).sum()

    norms = [np.sqrt(product(t - base, t - base)) for t in tensors]
    units = [(t - base) / n for t, n in zip(tensors, norms, strict=True)]
    length = np.sqrt(product(found - base, found - base))
    x = (found - base) / length
    shares = np.array(weights) / sum(weights)
    assert length == pytest.approx(shares @ norms, rel=1e-12)
    cosines = np.array([product(x, p) for p in units])
    np.testing.assert_allclose(result.angles, np.arccos(cosines), rtol=1e-6)
    angles = np.arccos(cosines)
    stretch = shares * angles / np.sin(angles)
    tangent = sum(s * (p - c * x) for s, p, c in zip(stretch, units, cosines, strict=True))
    assert np.sqrt(product(tangent, tangent)) < 1e-11


def test_it_is_the_mean_of_scaled_vectors_by_an_independent_slow_one():
    """In coordinates sqrt(G) x the metric is the plain one (50 digits, gradient descent)."""
    tensors, metrics, weights = problem(1, shape=(7,))
    root = np.sqrt(shared(metrics, weights))
    _, mean, *_ = slow_karcher([t * root for t in tensors], weights)
    expected = np.array([float(v) for v in mean]) / root
    np.testing.assert_allclose(mean_of(tensors, metrics, weights)[0], expected, rtol=1e-12)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_constant_metric_gives_the_plain_mean(granularity):
    tensors, _, weights = problem(2)
    plain, _ = karcher_mean([torch.as_tensor(t) for t in tensors], weights, granularity=granularity)
    constant = [np.full_like(tensors[0], value) for value in (3.0, 1e-20, 5.0)]
    found, _ = mean_of(tensors, constant, weights, granularity=granularity)
    np.testing.assert_allclose(found, plain, rtol=1e-13)
    flat, _ = mean_of(tensors, [None] * 3, weights, granularity=granularity)
    assert (flat == plain.numpy()).all()


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("magnitude", ["arithmetic", "linear", "geometric"])
def test_the_scale_of_all_metrics_says_nothing(granularity, magnitude):
    tensors, metrics, weights = problem(3)
    options = {"granularity": granularity, "magnitude": magnitude}
    found, _ = mean_of(tensors, metrics, weights, **options)
    for power in (-320, 200):
        again, _ = mean_of(tensors, [g * 2.0**power for g in metrics], weights, **options)
        np.testing.assert_allclose(again, found, rtol=1e-13)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_rows_take_their_part_of_the_metric(granularity, monkeypatch):
    # Two rows are solved at once.
    monkeypatch.setattr("mergekit_karcher.means.solve._ROW_ELEMENTS", 32)
    tensors, metrics, weights = problem(4)
    found, _ = mean_of(tensors, metrics, weights, granularity=granularity)
    root = torch.as_tensor(np.sqrt(shared(metrics, weights)))
    scaled, _ = karcher_mean(
        [torch.as_tensor(t) * root for t in tensors], weights, granularity=granularity
    )
    np.testing.assert_allclose(found, (scaled / root).numpy(), rtol=1e-12)


def test_what_the_metric_does_not_see_follows_what_it_sees():
    tensors, metrics, weights = problem(5)
    for g in metrics:
        g[:3] = 0
    changed = [t.copy() for t in tensors]
    for t in changed:
        t[:3] *= 100
    first, one = mean_of(tensors, metrics, weights, floor=0)
    second, other = mean_of(changed, metrics, weights, floor=0)
    np.testing.assert_allclose(one.coefficients, other.coefficients, rtol=1e-12)
    np.testing.assert_allclose(100 * first[:3], second[:3], rtol=1e-12)


def test_zeros_in_every_model(caplog):
    tensors, metrics, weights = problem(6)
    plain, _ = karcher_mean([torch.as_tensor(t) for t in tensors], weights)
    found, _ = mean_of(tensors, [0 * g for g in metrics], weights)
    assert (found == plain.numpy()).all()
    assert "zero in every model: it is merged as without any" in caplog.text
    # A row without floor has no length: the linear mean is all that is left.
    for g in metrics:
        g[2] = 0
    found, result = mean_of(tensors, metrics, weights, floor=0, granularity="row")
    linear = np.average([t[2] for t in tensors], axis=0, weights=weights)
    np.testing.assert_allclose(found[2], linear, rtol=1e-14)
    assert result.status is Status.CONVERGED
    # With it, what no model is sure of has the plain mean.
    found, _ = mean_of(tensors, metrics, weights, granularity="row")
    alone, _ = karcher_mean([torch.as_tensor(t[2]) for t in tensors], weights)
    np.testing.assert_allclose(found[2], alone.numpy(), rtol=1e-12)


def test_a_model_without_weight_lends_no_metric():
    tensors, metrics, weights = problem(7)
    bad = [*metrics[:2], -metrics[2]]
    expected, _ = mean_of(tensors[:2], metrics[:2], weights[:2])
    found, _ = mean_of(tensors, bad, [*weights[:2], 0])
    np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 2.0**-41])
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_gradients(based, granularity, scale):
    tensors, metrics, weights = problem(8, shape=(3, 4), spread=1.0)
    metrics = [scale * metric for metric in metrics]
    inputs = [torch.as_tensor(t).requires_grad_() for t in tensors]
    base = [torch.as_tensor(0.3 * tensors[0]).requires_grad_()] if based else []
    fixed = [torch.as_tensor(g) for g in metrics]

    def mean(*given):
        own = given[3] if based else None
        return karcher_mean(given[:3], weights, base=own, metrics=fixed, granularity=granularity)[0]

    assert torch.autograd.gradcheck(mean, (*inputs, *base))
    with pytest.raises(KarcherError, match="need a floor above 0"):
        karcher_mean(inputs, weights, metrics=fixed, floor=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", [gram.Precision.DOUBLE, gram.Precision.EXACT])
@pytest.mark.parametrize("by_row", [False, True])
def test_inner_products_over_pieces_and_strides(dtype, precision, by_row, monkeypatch):
    monkeypatch.setattr(gram, "CHUNK_ELEMENTS", 500)
    generator = torch.Generator().manual_seed(9)
    tensors = [torch.randn(30, 41, generator=generator).to(dtype) for _ in range(3)]
    base = torch.randn(41, 30, generator=generator).to(dtype).T
    metrics = [1e-15 * torch.rand(30, 41, generator=generator) ** 6 for _ in range(3)]
    inputs = checked_inputs("w", tensors, ["a", "b", "c"], [1, 2, 3], metrics=metrics)
    metric = inputs.sharing_a_metric(0.1).shared_metric
    found, exponents = gram.grams(
        tensors, base=base, with_base=True, metric=metric, by_row=by_row, precision=precision
    )
    g = sum(
        w / 3 * (m.double() + 0.1 * m.double().mean())
        for w, m in zip((1, 2, 3), metrics, strict=True)
    )
    vectors = [*(t.double() - base.double() for t in tensors), base.double()]
    spans = range(30) if by_row else [slice(None)]
    for row, span in enumerate(spans):
        expected = np.array([[(g * x * y)[span].sum() for y in vectors] for x in vectors])
        scaled = np.ldexp(found[row].astype(float), exponents[row][:, None] + exponents[row])
        np.testing.assert_allclose(scaled, expected, rtol=1e-12, atol=1e-12 * expected.max())


def test_metrics_are_padded_with_their_tensors():
    generator = torch.Generator().manual_seed(14)
    tensors = [torch.randn(shape, generator=generator).double() for shape in ((3, 5), (4, 4))]
    metric = torch.rand(4, 4, generator=generator).double()
    for metrics in ([None, metric], [torch.rand(3, 5).double(), metric]):
        found, _ = karcher_mean(tensors, metrics=metrics, pad=True)
        wide = [torch.zeros(4, 5).double() for _ in range(4)]
        for target, source in zip(wide, (*tensors, *metrics), strict=True):
            if source is not None:
                target[: source.shape[0], : source.shape[1]] = source
        given = [None if m is None else w for m, w in zip(metrics, wide[2:], strict=True)]
        expected, _ = karcher_mean(wide[:2], metrics=given)
        assert torch.equal(found, expected)
    with pytest.raises(KarcherError, match=r"has shape \(5, 5\)"):
        karcher_mean(tensors, metrics=[None, torch.ones(5, 5)], pad=True)


@pytest.mark.parametrize("scale", [1.0, 2.0**-41])
def test_a_chord_too_short_for_inner_products(monkeypatch, scale):
    monkeypatch.setattr(chords, "CHUNK_ELEMENTS", 100)
    rng = np.random.default_rng(10)
    first, step = rng.standard_normal((2, 900))
    g = scale * np.exp(2 * rng.standard_normal(900))
    step -= first * (g * step * first).sum() / (g * first * first).sum()
    second = first + 1e-8 * step
    inputs = checked_inputs(
        "w", [torch.as_tensor(first)], ["a"], [1.0], metrics=[torch.as_tensor(g)]
    )
    metric = inputs.sharing_a_metric(0).shared_metric
    norms = tuple(float(np.sqrt((g * x * x).sum())) for x in (first, second))
    found = squared_chord(torch.as_tensor(first), torch.as_tensor(second), norms, metric)
    expected = 1e-16 * (g * step * step).sum() / (g * first * first).sum()
    assert found == pytest.approx(expected, rel=1e-6)


def test_models_that_are_close_are_seen_in_the_metric_by_their_chords():
    """Half of the entries differ, by 1e-7: what the metric says of that half is the angle."""
    rng = np.random.default_rng(15)
    first, step = rng.standard_normal((2, 800))
    step[:400] = 0
    g = np.where(np.arange(800) < 400, 1.0, 1e-4)
    step -= first * (g * step * first).sum() / (g * first * first).sum()
    tensors = [torch.as_tensor(first), torch.as_tensor(first + 1e-7 * step)]
    metrics = [torch.as_tensor(g)] * 2
    inputs = checked_inputs("w", tensors, ["a", "b"], [1.0, 1.0], metrics=metrics)
    inputs = inputs.sharing_a_metric(0.0)
    seen = observed(inputs, products_of(inputs), ["a", "b"], None)
    expected = 1e-7 * np.sqrt((g * step * step).sum() / (g * first * first).sum())
    assert seen.zero.angles[0, 1] == pytest.approx(expected, rel=1e-6)


def test_a_whole_model_is_one_vector_of_all_its_tensors_and_metrics():
    pairs = [problem(seed, shape=(5, seed - 8)) for seed in (11, 12)]
    weights = [1.0, 2.0, 0.5]
    scale = 1e-9  # one tensor's metric is far below the other's, and stays so
    parts = [(t, [g * f for g in m]) for (t, m, _), f in zip(pairs, (1, scale), strict=True)]
    inputs = [
        checked_inputs(
            str(index),
            [torch.as_tensor(t) for t in tensors],
            ["a", "b", "c"],
            weights,
            metrics=[torch.as_tensor(g) for g in metrics],
        ).sharing_a_metric(FLOOR, always=True)
        for index, (tensors, metrics) in enumerate(parts)
    ]
    found, solution = merge_whole(inputs, Settings(granularity="model"), [True, True])
    mean = solution.mean
    roots = [np.sqrt(shared(metrics, weights)) for _, metrics in parts]
    vectors = [
        torch.cat(
            [torch.as_tensor(t[k] * r).flatten() for (t, _), r in zip(parts, roots, strict=True)]
        )
        for k in range(3)
    ]
    _, expected = karcher_mean(vectors, weights)
    np.testing.assert_allclose(mean.coefficients, expected.coefficients, rtol=1e-12)
    sums = [sum(k * t for k, t in zip(mean.coefficients, own, strict=True)) for own, _ in parts]
    for tensor, total in zip(found, sums, strict=True):
        np.testing.assert_allclose(tensor.numpy(), total, rtol=1e-12)


BAD = {
    "negative": (lambda g: -g, r"metric of the tensor for input 1 is negative"),
    "nan": (lambda g: g * np.nan, "is not finite everywhere"),
    "shape": (lambda g: g[:-1], r"has shape \(5, 8\), but the tensor has \(6, 8\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_metric_gets_one_sentence(case):
    change, words = BAD[case]
    tensors, metrics, _ = problem(13)
    with pytest.raises(KarcherError, match=words):
        mean_of(tensors, [metrics[0], change(metrics[1]), metrics[2]])
    with pytest.raises(KarcherError, match="needs one metric for each of 3"):
        mean_of(tensors, metrics[:2])
    with pytest.raises(KarcherError, match="floor is -1"):
        mean_of(tensors, metrics, floor=-1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models, and a metric of each."""
    folder = tmp_path_factory.mktemp("sphere")
    found = []
    for seed in range(3):
        model = llama(folder / f"m{seed}", seed, dtype=torch.float32)
        generator = torch.Generator().manual_seed(50 + seed)
        metric = {
            name: 1e-12 * torch.rand(t.shape, generator=generator) ** 4
            for name, t in weights_of(model).items()
        }
        path = folder / f"g{seed}"
        path.mkdir()
        save_file(metric, path / "model.safetensors")
        found.append((model, str(path), metric))
    return found


def metric_config(models, metrics, weights=(1, 2, 0.5), **settings):
    """A config of the first models, as many as there are."""
    count = len(models)
    return config_for(models, weights[:count], metrics=metrics[:count], **settings)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("around_base", [False, True])
def test_a_real_merge(models, merge, granularity, around_base):
    paths, metrics, tensors = zip(*models, strict=True)
    count = 2 if around_base else 3
    config = metric_config(paths[:count], metrics, granularity=granularity)
    if around_base:
        config["base_model"] = paths[2]
        config["parameters"]["origin"] = "base"
    found = merge(config).weights
    inputs = [weights_of(path) for path in paths]
    for name, own in found.items():
        expected, _ = karcher_mean(
            [i[name] for i in inputs[:count]],
            [1, 2, 0.5][:count],
            base=inputs[2][name] if around_base else None,
            metrics=[t[name] for t in tensors[:count]],
            granularity=granularity,
        )
        assert torch.equal(own, expected), name


def test_a_real_merge_of_whole_models(models, merge):
    paths, metrics, tensors = zip(*models, strict=True)
    found = merge(metric_config(paths, metrics, granularity="model")).weights
    inputs = [weights_of(path) for path in paths]
    weights = [1, 2, 0.5]
    roots = {
        name: shared([t[name].double().numpy() for t in tensors], weights) ** 0.5 for name in found
    }
    vectors = [
        torch.cat([(i[name].double() * torch.as_tensor(roots[name])).flatten() for name in found])
        for i in inputs
    ]
    _, mean = karcher_mean(vectors, weights)
    for name, own in found.items():
        expected = sum(k * i[name].double() for k, i in zip(mean.coefficients, inputs, strict=True))
        torch.testing.assert_close(own.double(), expected, rtol=2**-22, atol=1e-9)


def test_whole_models_of_which_no_metric_sees_anything(models, merge, tmp_path, caplog):
    paths, _, tensors = zip(*models, strict=True)
    for index, metric in enumerate(tensors):
        folder = tmp_path / f"zero{index}"
        folder.mkdir()
        save_file({n: 0 * t for n, t in metric.items()}, folder / "model.safetensors")
    zeros = [str(tmp_path / f"zero{index}") for index in range(3)]
    found = merge(metric_config(paths, zeros, granularity="model")).weights
    assert "no input with a weight has any length; the weighted linear mean" in caplog.text
    name = "model.norm.weight"
    shares = np.array([1, 2, 0.5]) / 3.5
    linear = sum(s * weights_of(p)[name].double() for s, p in zip(shares, paths, strict=True))
    torch.testing.assert_close(found[name].double(), linear, rtol=1e-7, atol=0)


@pytest.mark.parametrize("granularity", ["tensor", "row", "model"])
@pytest.mark.parametrize("origin", ["zero", "base"])
def test_the_report_sees_the_metric(models, merge, tmp_path, monkeypatch, granularity, origin):
    paths, metrics, tensors = zip(*models, strict=True)
    count = 2 if origin == "base" else 3
    config = metric_config(paths[:count], metrics, granularity=granularity, origin=origin)
    if origin == "base":
        config["base_model"] = paths[2]
    file = tmp_path / "report.yml"
    file.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(main, ["report", str(file), "--json"])
    assert result.exit_code == 0, result.output
    report = Report.model_validate_json(result.stdout)
    assert report.settings.in_metric
    assert report.verdict.startswith("Angles and lengths are measured in the metric that")
    name = "model.layers.1.mlp.up_proj.weight"
    own = next(tensor for tensor in report.tensors if tensor.name == name)
    weights = [1, 2, 0.5][:count]
    g = shared([t[name].double().numpy() for t in tensors[:count]], weights)
    inputs = [weights_of(path)[name].double().numpy() for path in paths]
    vectors = [i - (inputs[2] if origin == "base" else 0) for i in inputs[:count]]
    # The largest weight counts as one: only ratios of metrics say anything.
    norms = [np.sqrt((g * v * v).sum() / max(weights)) for v in vectors]
    np.testing.assert_allclose(own.norms[:count], norms, rtol=1e-9)
    cosine = (g * vectors[0] * vectors[1]).sum() / max(weights) / norms[0] / norms[1]
    assert own.angles[0][1] == pytest.approx(np.arccos(cosine), rel=1e-7)
    monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(tmp_path / "geometry"))
    merge(config)
    written = json.loads((tmp_path / "geometry" / "report.json").read_text())
    assert written == json.loads(result.stdout)


def test_mistakes_while_planning(models, merge, tmp_path):
    paths, metrics, _ = zip(*models, strict=True)
    one_without = metric_config(paths, [*metrics[:2], ""])
    outcome = merge(one_without, name="without")
    assert (outcome.exit_code, outcome.out.exists()) == (1, False)
    assert f"needs a metric for {paths[2]}" in outcome.output
    some = [[{"filter": "mlp", "value": metric}, {"value": ""}] for metric in metrics]
    outcome = merge(metric_config(paths, some, granularity="model"), name="some")
    assert "some tensors have a metric and" in outcome.output
    # Tensor by tensor that is fine: those without have the plain mean.
    found = merge(metric_config(paths, some), name="fine").weights
    plain = merge(metric_config(paths, [""] * 3), name="plain").weights
    same = {name: torch.equal(found[name], plain[name]) for name in plain}
    assert all(is_same == ("mlp" not in name) for name, is_same in same.items())


def test_what_takes_no_part_needs_no_metric(models, merge, tmp_path):
    paths, metrics, _ = zip(*models, strict=True)
    without = metric_config(paths, [*metrics[:2], ""], weights=(1, 2, 0))
    expected = merge(metric_config(paths[:2], metrics), name="two").weights
    found = merge(without, name="three").weights
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Of a tensor that a model has not, its metric has none either.
    generator = torch.Generator().manual_seed(16)
    for index, names in enumerate((["w", "v"], ["w"])):
        for kind in ("model", "metric"):
            own = {name: torch.rand(4, generator=generator) for name in names}
            save_file(own, tmp_path / f"{kind}{index}.safetensors")
    config = metric_config(
        [str(tmp_path / f"model{index}.safetensors") for index in range(2)],
        [str(tmp_path / f"metric{index}.safetensors") for index in range(2)],
    )
    del config["dtype"]
    for method in ("karcher", "fisher"):
        raw = merge(
            config | {"merge_method": method, "parameters": {}},
            "--tensor-union",
            command="mergekit-pytorch",
            name=method,
        )
        assert torch.equal(raw.weights["v"], load_file(tmp_path / "model0.safetensors")["v"])


def test_in_python_the_method_sends_you_to_the_function():
    from mergekit.merge_methods import merge_state_dicts

    for granularity in ("tensor", "model"):
        with pytest.raises(KarcherError, match=r"call mergekit_karcher\.karcher_mean"):
            merge_state_dicts(
                [{"w": torch.ones(2)}] * 2,
                "karcher",
                parameters={"metric": "x", "granularity": granularity},
            )


def test_a_buffer_of_whole_numbers_needs_no_metric(merge, tmp_path):
    for index in range(2):
        tensors = {"w": torch.randn(4) + index, "steps": torch.tensor([7])}
        save_file(tensors, tmp_path / f"m{index}.safetensors")
        save_file({"w": torch.rand(4)}, tmp_path / f"g{index}.safetensors")
    for method in ("karcher", "fisher"):
        config = {
            "merge_method": method,
            "models": [
                {
                    "model": str(tmp_path / f"m{index}.safetensors"),
                    "parameters": {"metric": str(tmp_path / f"g{index}.safetensors")},
                }
                for index in range(2)
            ],
        }
        found = merge(config, command="mergekit-pytorch", name=method).weights
        assert found["steps"].tolist() == [7]
