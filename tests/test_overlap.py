"""Of which inputs models changed the treatment: the kernel, and the report that tells it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import write
from configs import config_for
from conftest import weights_of
from reports import report_of
from safetensors.torch import load_file, save_file

from mergekit_karcher.host.rows import is_layer
from mergekit_karcher.kernels import overlap
from mergekit_karcher.kernels.overlap import input_products
from mergekit_karcher.report.apart import plain
from mergekit_karcher.report.overlap import of_inputs


def metric_of(change):
    """A = t' t / |t|^2 of a change (out, in)."""
    change = np.asarray(change, np.float64)
    return change.T @ change / np.square(change).sum()


def reference(changes, weights):
    """Overlap and inputs in use of changes (out, in), from their whole metrics."""
    pairs = [(w, t) for w, t in zip(weights, changes, strict=True) if np.asarray(t).any()]
    metrics = [metric_of(t) for _, t in pairs]
    cosines, products = [], []
    for i, (first, a) in enumerate(zip(pairs, metrics, strict=True)):
        for second, b in list(zip(pairs, metrics, strict=True))[:i]:
            cosines.append(np.trace(a @ b) / np.sqrt(np.trace(a @ a) * np.trace(b @ b)))
            products.append(first[0] * second[0])
    mean = sum(w * a for (w, _), a in zip(pairs, metrics, strict=True))
    mean = mean / sum(w for w, _ in pairs)
    in_use = 1 / (len(mean) * np.trace(mean @ mean))
    return np.average(cosines, weights=products), in_use


def measured(changes, weights=None, base=None, dtype=torch.float32, seed=0):
    weights = np.ones(len(changes)) if weights is None else np.array(weights, dtype=float)
    base = torch.zeros(changes[0].shape) if base is None else base
    layers = [(base + torch.as_tensor(t)).to(dtype) for t in changes]
    products = input_products(layers, base.to(dtype), seed)
    found = of_inputs(products, weights / weights.sum(), ())
    return (found["input_overlap"], found["inputs_in_use"]) if found else None


def random_changes(count, shape, rank=None, seed=3):
    """Changes that share a part of their inputs."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = shape
    rank = rank or min(shape)
    shared = torch.randn(rank, inputs, generator=generator)
    return [
        torch.randn(outputs, rank, generator=generator)
        @ (0.5 * shared + torch.randn(rank, inputs, generator=generator))
        / rank
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(20, 30), (70, 12), (1, 8)])
def test_small_layers_are_exact(count, shape):
    changes = random_changes(count, shape)
    weights = [1, 3, 0.5, 2, 1][:count]
    expected = reference(changes, weights)
    assert measured(changes, weights) == pytest.approx(expected, rel=1e-5)
    if shape != (1, 8):
        assert expected != pytest.approx(reference(changes, [1] * count), rel=1e-3) or count == 2


@pytest.mark.parametrize("rank", [2, 16, None])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (500, 40)])
def test_sketches_of_large_layers_are_close_to_it(monkeypatch, shape, rank):
    monkeypatch.setattr(overlap, "EXACT", 0)
    monkeypatch.setattr(overlap, "CHUNK_ELEMENTS", 7 * shape[1] + 3)
    changes = random_changes(4, shape, rank and min(rank, shape[1]))
    expected = np.array(reference(changes, [1, 2, 3, 4]))
    found = np.array([measured(changes, [1, 2, 3, 4], seed=seed) for seed in range(20)])
    assert found.std(0).max() > 1e-6  # these are no exact values
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=0.1)
    np.testing.assert_allclose(found.mean(0), expected, atol=0.02)


def test_the_products_of_sketches_have_no_bias(monkeypatch):
    """Over many seeds their average is the exact value, times |t_i|^2 |t_j|^2."""
    monkeypatch.setattr(overlap, "EXACT", 0)
    monkeypatch.setattr(overlap, "ROWS", 4)
    changes = random_changes(2, (12, 9), rank=3)
    grams = [(t.T @ t).double() for t in changes]
    exact = torch.tensor([[float((a * b).sum()) for a in grams] for b in grams])
    layers, base = changes, torch.zeros(12, 9)
    total = torch.zeros(2, 2, dtype=torch.float64)
    seeds = 4000
    for seed in range(seeds):
        rows = overlap._sketches(layers, base, torch.float32, seed)
        lengths = rows.double().square().sum((1, 2))
        total += overlap._traces(rows, False) * lengths * lengths[:, None] / 16
    torch.testing.assert_close(total / seeds, exact.double(), rtol=0.05, atol=0)


@pytest.mark.parametrize("sketched", [False, True])
def test_equal_changes_overlap_by_one_and_orthogonal_ones_by_zero(monkeypatch, sketched):
    if sketched:
        monkeypatch.setattr(overlap, "EXACT", 0)
    (change,) = random_changes(1, (100, 80), rank=3)
    for others in ([2 * change], [-change, 1e-6 * change]):
        found, _ = measured([change, *others])
        assert found == pytest.approx(1, abs=0.05 if sketched else 1e-5)
    left, right = change.clone(), change.clone()
    left[:, 40:], right[:, :40] = 0, 0
    assert measured([left, right])[0] == pytest.approx(0, abs=1e-9)
    # The same outputs do not matter, only the same inputs.
    assert measured([left[:50].repeat(2, 1), left])[0] > 0.5


def test_the_inputs_in_use_are_a_part_of_all():
    one_input = torch.zeros(5, 8)
    one_input[2, 3] = 7
    another = torch.zeros(5, 8)
    another[4, 1] = -1
    assert measured([one_input, one_input])[1] == pytest.approx(1 / 8)
    assert measured([one_input, another]) == (0, pytest.approx(2 / 8))
    all_alike = torch.eye(8)
    assert measured([all_alike, all_alike]) == pytest.approx((1, 1))


@pytest.mark.parametrize("sketched", [False, True])
def test_a_model_that_did_not_change_is_left_out(monkeypatch, sketched):
    if sketched:
        monkeypatch.setattr(overlap, "EXACT", 0)
    changes = random_changes(3, (100, 80), rank=5)
    changes[1] = torch.zeros(100, 80)
    base = torch.randn(100, 80)
    products = input_products([base + t for t in changes], base, 0)
    assert np.isnan(products[1]).all()
    assert np.isnan(products[:, 1]).all()
    expected = reference([changes[0], changes[2]], [1, 3])
    found = measured(changes, [1, 2, 3], base)
    assert found == pytest.approx(expected, abs=0.15 if sketched else 1e-4)
    assert measured([changes[0], changes[1]], None, base) is None


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("rows", [20, 200])
def test_very_small_and_very_large_changes_are_right(scale, rows, monkeypatch):
    monkeypatch.setattr(overlap, "EXACT", 0)
    changes = random_changes(3, (rows, 30))
    scaled = [scale * change for change in changes]
    assert measured(scaled) == pytest.approx(measured(changes), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sketched", [False, True])
def test_any_dtype_and_strides_and_the_inputs_stay(monkeypatch, dtype, sketched):
    if sketched:
        monkeypatch.setattr(overlap, "EXACT", 0)
    changes = random_changes(3, (120, 90), rank=6)
    base = torch.randn(120, 90).to(dtype)
    layers = [base + t.to(dtype) for t in changes]
    before = [layer.clone() for layer in layers]
    found = input_products(layers, base, 5)
    turned = [layer.T.contiguous().T for layer in layers]
    np.testing.assert_array_equal(input_products(layers, base, 5), found)
    np.testing.assert_allclose(input_products(turned, base, 5), found, rtol=1e-5)
    for layer, copy in zip(layers, before, strict=True):
        assert torch.equal(layer, copy)


def expected_of(base, models, weights, turned=()):
    """By tensor what the report has to say, from the files."""
    found = {}
    start = {name: tensor.double() for name, tensor in weights_of(base).items()}
    states = [weights_of(model) for model in models]
    for name, origin in start.items():
        if is_layer(name, origin.shape) and origin.ndim == 2:
            changes = [(state[name].double() - origin).numpy() for state in states]
            changes = [t.T if name.endswith(turned) else t for t in changes] if turned else changes
            if sum(bool(t.any()) for t in changes) > 1:
                found[name] = reference(changes, weights)
    return found


def check(report, expected):
    for tensor in report.tensors:
        values = (tensor.input_overlap, tensor.inputs_in_use)
        known = tensor.name in expected
        target = pytest.approx(expected[tensor.name], rel=1e-3) if known else (None, None)
        assert values == target, tensor.name


@pytest.mark.parametrize(
    "settings",
    [
        {"origin": "base"},
        {"origin": "zero"},
        {"origin": "base", "granularity": "row"},
        {"origin": "base", "granularity": "model"},
        {"merge_method": "ties"},
        {"merge_method": "fisher", "metrics": ["self"] * 3},
    ],
    ids=str,
)
def test_the_report_says_it_for_every_config_with_a_base(close_models, cli, settings):
    base, *models = close_models
    config = config_for(models, [1, 2, 3], base=base, **settings)
    result = cli("report", "--json", config=config)
    report = report_of(result)
    expected = expected_of(base, models, [1, 2, 3])
    assert len(expected) == 22
    check(report, expected)
    sizes = [tensor.size for tensor in report.tensors if tensor.name in expected]
    values = [expected[tensor.name] for tensor in report.tensors if tensor.name in expected]
    average = np.average(values, axis=0, weights=sizes)
    overall = report.overall
    found = (overall.input_overlap_average, overall.inputs_in_use_average)
    assert found == pytest.approx(tuple(average), rel=1e-3)
    kinds = {kind.kind: kind for kind in report.kinds}
    assert kinds["norms"].input_overlap_average is None
    assert kinds["embeddings"].input_overlap_average is None
    up = [expected[f"model.layers.{layer}.mlp.up_proj.weight"][0] for layer in range(3)]
    assert kinds["up"].input_overlap_average == pytest.approx(np.mean(up), rel=1e-3)
    assert f"respond to overlap by {average[0]:.3g} (0: others, 1: the same)" in report.verdict
    assert cli("report", "--json", config=config).stdout == result.stdout
    shown = cli("report", "--quiet", config=config).stdout
    rows = [line.split() for line in shown.splitlines() if line.strip().startswith("up ")]
    assert [f"{np.mean(up):.3g}", f"{100 * kinds['up'].inputs_in_use_average:.3g}"] in [
        row[-2:] for row in rows
    ]
    assert max(map(len, shown.splitlines())) <= 80


def test_without_a_base_and_with_one_model_there_is_nothing_to_say(close_models, cli):
    base, *models = close_models
    for config in (config_for(models), config_for(models[:1], base=base)):
        result = cli("report", "--json", config=config)
        report = report_of(result)
        assert {tensor.input_overlap for tensor in report.tensors} == {None}
        assert report.overall.input_overlap_average is None
        assert "overlap" not in report.verdict
        assert "overlap" not in cli("report", "--quiet", config=config).stdout


def test_layers_that_a_family_stores_input_first_are_turned(tmp_path, cli):
    base = write("gpt2", tmp_path / "base", 0)
    models = []
    for seed in (1, 2):
        models.append(write("gpt2", tmp_path / f"m{seed}", 0))
        generator = torch.Generator().manual_seed(seed)
        for file in (tmp_path / f"m{seed}").glob("*.safetensors"):
            tensors = load_file(file)
            for tensor in tensors.values():
                if tensor.ndim == 2:
                    left = torch.randn(len(tensor), 2, generator=generator)
                    right = torch.randn(2, tensor.shape[1], generator=generator)
                    tensor += 0.01 * (left @ right).to(tensor.dtype)
            save_file(tensors, file, metadata={"format": "pt"})
    config = config_for(models, base=base, origin="base")
    report = report_of(cli("report", "--json", config=config))
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    expected = expected_of(base, models, [1, 1], turned)
    assert sum(name.endswith(turned) for name in expected) >= 4
    check(report, expected)


def raw(folder, tensors):
    """Checkpoints of one file."""
    paths = [str(folder / f"m{index}.safetensors") for index in range(len(tensors))]
    for path, tensor in zip(paths, tensors, strict=True):
        save_file({"layers.0.mlp.up_proj.weight": tensor.contiguous()}, path)
    return paths


def verdict_on(folder, cli, base, changes):
    folder.mkdir(exist_ok=True)
    *models, start = raw(folder, [*(base + change for change in changes), base])
    config = config_for(models, base=start, origin="base")
    return report_of(cli("report", "--json", config=config)).verdict


def test_the_verdict_says_whether_changes_can_be_kept(tmp_path, cli):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(60, 50, generator=generator)
    changes = random_changes(4, (60, 50), rank=1)
    apart = []
    for index, change in enumerate(changes):
        only = torch.zeros(60, 50)
        only[:, 10 * index : 10 * index + 10] = change[:, :10]
        apart.append(0.1 * only)
    kept = verdict_on(tmp_path, cli, base, apart)
    assert "(0: others, 1: the same): merge_method: fisher with metric: self can keep most" in kept
    same = verdict_on(tmp_path / "same", cli, base, [0.1 * s * changes[0] for s in (1, -1, 2, 0.5)])
    assert "metric: self draws towards the linear mean, since the models compete" in same
    assert "network holds" not in kept + same


@pytest.mark.parametrize("length", [0.2, 0.8])
@pytest.mark.parametrize("rank", [2, 30])
def test_long_changes_that_fill_the_inputs_are_told(tmp_path, cli, length, rank):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(60, 50, generator=generator)
    changes = random_changes(4, (60, 50), rank=rank)
    changes = [length * base.norm() / change.norm() * change for change in changes]
    verdict = verdict_on(tmp_path, cli, base, changes)
    is_full = (length, rank) == (0.8, 30)
    assert ("ask for more than the network holds" in verdict) == is_full
    assert (f"But the changes are {length} times as long as the base" in verdict) == is_full


def test_models_that_are_no_fine_tunes_of_the_base_are_named(tmp_path, cli):
    generator = torch.Generator().manual_seed(1)
    base, other, change = torch.randn(3, 60, 50, generator=generator)
    verdict = verdict_on(tmp_path, cli, base, [0.1 * change, other - base, 0.2 * change])
    assert "m1.safetensors: as far from the base as unrelated models are" in verdict
    assert "m0.safetensors" not in verdict
    assert f"up to {float((other - base).norm() / base.norm()):.3g} times as long" in verdict
    assert "for fine-tunes of one base" in verdict
    assert "overlap" not in verdict
    near = verdict_on(tmp_path / "near", cli, base, [0.1 * change, 0.2 * change])
    assert "unrelated" not in near


def test_a_model_whose_change_is_rounding_error_does_not_count(tmp_path, cli):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(60, 50, generator=generator).bfloat16()
    changes = [t.bfloat16() for t in random_changes(3, (60, 50), rank=3)]
    changes[1] = (1e-4 * torch.randn(60, 50, generator=generator)).bfloat16()
    verdict = verdict_on(tmp_path, cli, base, changes)
    true = [((base + t).float() - base.float()).numpy() for t in changes]
    overlap_of_two, _ = reference([true[0], true[2]], [1, 1])
    assert f"overlap by {plain(overlap_of_two)} " in verdict
