"""The numbers of a report against plain sums over the weights."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from configs import config_for
from conftest import weights_of
from inputs import ambient_mean
from reports import close, pairwise, report_of, vectors_of
from wide import WIDE, angle, norm

from mergekit_karcher.report.apart import average_by_pair


@pytest.mark.parametrize("origin", ["zero", "base"])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, 1, 3]])
def test_every_number_of_a_tensor(close_models, cli, origin, weights):
    base, *models = close_models
    config = config_for(models, weights, base=base if origin == "base" else None, origin=origin)
    report = report_of(cli("report", "--json", config=config))
    assert report.schema_ == "mergekit-karcher/report/1"
    assert {t.name for t in report.tensors} == set(weights_of(base))
    shares = np.array(weights) / np.sum(weights)
    for tensor in report.tensors:
        plain = vectors_of(models, tensor.name)
        start = vectors_of([base], tensor.name)[0] if origin == "base" else 0 * plain[0]
        vectors = [np.asarray(v, WIDE) - start for v in plain]
        count = len(models)
        assert tensor.shape == list(weights_of(base)[tensor.name].shape)
        assert (tensor.origin, tensor.granularity) == (origin, "tensor")
        norms = np.array([float(norm(v)) for v in vectors])
        close(tensor.norms[:count], norms, rtol=1e-7)
        close([row[:count] for row in tensor.angles[:count]], pairwise(vectors), atol=1e-7)
        linear = sum(w * v for w, v in zip(shares, vectors, strict=True))
        assert tensor.linear_length == pytest.approx(float(norm(linear)) / (shares @ norms))
        mean = ambient_mean([v.astype(float) for v in vectors], weights)
        combined = sum(k * v for k, v in zip(tensor.coefficients, vectors, strict=False))
        np.testing.assert_allclose(combined.astype(float), mean, atol=1e-7 * norms.max())
        to_mean = [angle(v, mean) for v in vectors]
        close(tensor.angles_to_mean[:count], to_mean, rtol=1e-5, atol=1e-9)
        spread = math.sqrt(shares @ np.square(to_mean))
        assert tensor.spread == pytest.approx(spread, rel=1e-5)
        assert tensor.unique
        assert tensor.status == "converged"
        length = shares @ norms
        gap = norm(mean / norm(mean) - linear / norm(linear)) * length
        rounding = 2**-24 * 0.425 * (shares @ [float(norm(v)) for v in plain])
        assert tensor.linear_gap == pytest.approx(float(gap) / rounding, rel=1e-2, abs=1e-2)
        scaled = mean - linear.astype(float)
        difference = float(norm(scaled) / norm(mean))
        assert tensor.linear_difference == pytest.approx(difference, rel=1e-5, abs=1e-12)
        if origin == "base":
            other = tensor.other
            assert other.origin == "zero"
            close(other.norms, [float(norm(v)) for v in [*plain, start]], rtol=1e-12)
            close(other.angles, pairwise([*plain, start]), rtol=1e-6, atol=1e-9)
            noise = [
                2**-24 * 0.425 * norm(p) / norm(v) for p, v in zip(plain, vectors, strict=True)
            ]
            if tensor.kind != "norms":
                close(tensor.rounding[:count], noise, rtol=1e-6)
            assert tensor.coefficients[count] is None


def test_the_whole_model_and_the_kinds(close_models, cli):
    base, *models = close_models
    config = config_for(models, base=base, origin="base")
    report = report_of(cli("report", "--json", config=config))
    names = sorted(weights_of(base))

    def flat(path):
        return np.concatenate([v for name in names for v in vectors_of([path], name)])

    whole = [flat(path) for path in [*models, base]]
    close(report.whole.angles, pairwise(whole), rtol=1e-6, atol=1e-9)
    tasks = [np.asarray(v, WIDE) - whole[-1] for v in whole[:-1]]
    close([row[:3] for row in report.whole_tasks.angles[:3]], pairwise(tasks), atol=1e-6)
    kept = norm(sum(tasks)) / sum(norm(t) for t in tasks)
    assert report.whole_tasks.linear_length == pytest.approx(float(kept), rel=1e-6)
    kinds = {kind.kind: kind for kind in report.kinds}
    assert set(kinds) == {"embeddings", "norms", "q", "k", "v", "o", "gate", "up", "down", "head"}
    up = kinds["up"]
    angles, task_angles, lengths = [], [], []
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        vectors, start = vectors_of(models, name), vectors_of([base], name)[0]
        angles += [angle(p, q) for p, q in combinations(vectors, 2)]
        task_angles += [angle(p - start, q - start) for p, q in combinations(vectors, 2)]
        lengths.append(float(norm(sum(vectors)) / sum(norm(v) for v in vectors)))
    assert up.tensors == 3
    assert up.angle_median == pytest.approx(np.median(angles), rel=1e-6)
    assert up.angle_largest == pytest.approx(max(angles), rel=1e-6)
    assert up.task_angle_median == pytest.approx(np.median(task_angles), rel=1e-5)
    assert up.linear_length_median == pytest.approx(np.median(lengths), rel=1e-9)
    assert up.not_unique == 0


def test_a_base_that_takes_part_shows_task_vectors_too(close_models, cli):
    base, *models = close_models
    report = report_of(cli("report", "--json", config=config_for(models, base=base)))
    names = [model.name for model in report.models]
    assert names == ["tune1", "tune2", "tune3", "base"]
    assert [model.is_base for model in report.models] == [False, False, False, True]
    around = report_of(cli("report", "--json", config=config_for(models, base=base, origin="base")))
    for tensor, other in zip(report.tensors, around.tensors, strict=True):
        assert tensor.origin == "zero"
        close(
            [row[:3] for row in tensor.other.angles[:3]],
            [row[:3] for row in other.angles[:3]],
            atol=2e-5,
        )
        close(tensor.other.norms[:3], other.norms[:3], rtol=1e-6)
        assert tensor.other.norms[3] is None


def test_weights_by_filter_give_the_lengths_of_what_is_merged(close_models, cli):
    base, first, second, _ = close_models
    weights = [[{"filter": "norm", "value": 0.01}, {"value": 1}], 1]
    report = report_of(cli("report", "--json", config=config_for([first, second], weights)))
    merged = means = 0.0
    for name in weights_of(base):
        shares = np.array([0.01, 1] if "norm" in name else [1, 1])
        shares = shares / shares.sum()
        vectors = vectors_of([first, second], name)
        merged += float(norm(shares @ np.array(vectors)) ** 2)
        means += float(shares @ [norm(v) for v in vectors]) ** 2
    assert report.whole.linear_length == pytest.approx(math.sqrt(merged / means), rel=1e-9)


def test_weights_of_zero_leave_a_model_out_where_they_stand(close_models, cli):
    weight = [{"filter": "mlp", "value": 0}, {"value": 1}]
    models = close_models[1:]
    report = report_of(cli("report", "--json", config=config_for(models, [1, weight, 1])))
    for tensor in report.tensors:
        present = [norm is not None for norm in tensor.norms]
        assert present == [True, "mlp" not in tensor.name, True]


@pytest.mark.parametrize("origin", ["zero", "base"])
def test_how_far_apart_is_one_number_wherever_it_stands(close_models, cli, merge, tmp_path, origin):
    """On average over tensors counted by their parameters, in JSON, sentence, table and summary."""
    base, *models = close_models
    config = config_for(models, [1, 2, 3], base=base, origin=origin)
    if origin == "zero":
        del config["base_model"]
    total = size = largest = 0.0
    for name, tensor in weights_of(base).items():
        start = vectors_of([base], name)[0] if origin == "base" else 0.0
        pairs = combinations([v - start for v in vectors_of(models, name)], 2)
        angles = [math.degrees(angle(p, q)) for p, q in pairs]
        total += tensor.numel() * sum(angles)
        size += tensor.numel() * len(angles)
        if max(angles) > largest:
            largest, where = max(angles), name
    said = f"{total / size:.3g} degrees apart on average, {largest:.3g} at most (in {where})"
    report = report_of(cli("report", "--json", config=config))
    overall = report.overall
    found = overall.task_angle_average if origin == "base" else overall.angle_average
    assert math.degrees(found) == pytest.approx(total / size, rel=1e-6)
    assert said in report.verdict
    whole = average_by_pair(report.tensors, origin, len(report.models))
    of_models = whole[:3, :3][np.tril_indices(3, -1)]
    assert math.degrees(of_models.mean()) == pytest.approx(total / size, rel=1e-6)
    shown = cli("report", "--quiet", config=config).stdout
    rows = [line.split() for line in shown.splitlines() if line.strip().startswith("all ")]
    row = rows[1][1:] if origin == "base" else rows[0][2:]
    assert row[:2] == [f"{total / size:.3g}", f"{largest:.3g}"]
    what = {"zero": "models", "base": "changes from the base"}[origin]
    assert f"tensors merged, {what} {said}, 0 not certified unique" in merge(config).output
