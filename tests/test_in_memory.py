"""mergekit's in-memory API, without a plan; and what a result may hold."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from processes import run
from safetensors.torch import save_file
from test_merges import assert_stopped

from mergekit_karcher import KarcherError, fisher_mean, karcher_mean


def states(count, seed=0, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def test_fisher_without_metrics_is_the_weighted_linear_mean():
    models = states(3, w=(5, 4), b=(4,))
    merged = merge_state_dicts(models, "fisher", parameters={"weight": [1, 2, 0.5]})
    for name, tensor in merged.items():
        expected = sum(w * m[name].double() for w, m in zip((1, 2, 0.5), models, strict=True)) / 3.5
        torch.testing.assert_close(tensor.double(), expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize(
    ("method", "function"), [("fisher", "fisher_mean"), ("karcher", "karcher_mean")]
)
def test_metrics_in_memory_are_refused_in_a_sentence(method, function):
    for parameters in ({"metric": "x"}, {"metric": ["identity", ""]}):
        with pytest.raises(KarcherError, match=rf"call mergekit_karcher\.{function}"):
            merge_state_dicts(states(2, w=(2,)), method, parameters=parameters)
    whole = {"metric": "x", "granularity": "model"}
    with pytest.raises(KarcherError, match=r"call mergekit_karcher\.karcher_mean"):
        merge_state_dicts(states(2, w=(2,)), "karcher", parameters=whole)


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_tied_weights_of_a_whole_model_count_once_whatever_the_dtype(dtype):
    models = states(2, seed=1, embed=(6, 3), w=(4, 4))
    tied = [model | {"head": model["embed"]} for model in models]
    parameters = {"granularity": "model", "weight": [1, 2]}
    merged = merge_state_dicts(tied, "karcher", parameters=parameters, dtype=dtype)
    expected = merge_state_dicts(models, "karcher", parameters=parameters, dtype=dtype)
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor)
    assert torch.equal(merged["head"], expected["embed"])


def test_tied_weights_of_some_models_alone_count_as_two():
    first, second = states(2, seed=2, embed=(6, 3), w=(4, 4))
    models = [first | {"head": first["embed"]}, second | {"head": second["embed"].clone()}]
    merged = merge_state_dicts(models, "karcher", parameters={"granularity": "model"})
    vectors = [torch.cat([m[n].flatten() for n in ("embed", "w", "head")]) for m in models]
    expected, _ = karcher_mean(vectors)
    found = torch.cat([merged[name].flatten() for name in ("embed", "w", "head")])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


# Two at right angles, as long as float16 can hold: their mean, as long, lies between them.
LARGE = 60000.0
BEYOND = "the largest number that float16 holds"


def test_a_mean_beyond_float16_is_refused():
    first = torch.tensor([LARGE, LARGE, 0.0]).half()
    second = torch.tensor([LARGE, -LARGE, 0.0]).half()
    with pytest.raises(KarcherError, match=rf"the tensor is beyond 65504 at \[0\], {BEYOND}"):
        karcher_mean([first, second])
    wide, mean = karcher_mean([first.float(), second.float()])
    assert wide[0] == pytest.approx(LARGE * 2**0.5, rel=1e-6)
    assert mean.length == pytest.approx(LARGE * 2**0.5, rel=1e-12)
    # Rows, and differences from a base, are refused alike.
    with pytest.raises(KarcherError, match=BEYOND):
        karcher_mean([first[None], second[None]], granularity="row")
    base = torch.tensor([-LARGE, 0.0, 0.0]).half()
    with pytest.raises(KarcherError, match=BEYOND):
        karcher_mean([first, second], base=base)


def test_values_near_the_largest_of_float16_are_kept():
    first, second = torch.tensor([65504.0, 1.0]).half(), torch.tensor([65504.0, -1.0]).half()
    for base in (None, torch.tensor([65504.0, 0.0]).half(), torch.tensor([-65504.0, 0.0]).half()):
        merged, _ = karcher_mean([first, second], base=base)
        assert merged[0] == 65504


def test_a_cast_to_a_narrower_output_is_refused_in_memory_and_on_disk(merge, tmp_path):
    tensors = [torch.tensor([1e5, 1.0, 0.0]), torch.tensor([1e5, 0.0, 1.0])]
    for method in ("karcher", "fisher"):
        with pytest.raises(KarcherError, match=BEYOND):
            merge_tensors(tensors, method, out_dtype=torch.float16)
        assert torch.isfinite(merge_tensors(tensors, method, out_dtype=torch.bfloat16)).all()
    with pytest.raises(KarcherError, match=BEYOND):
        merge_state_dicts(
            [{"w": tensor} for tensor in tensors],
            "karcher",
            parameters={"granularity": "model"},
            out_dtype=torch.float16,
        )
    paths = [str(tmp_path / f"{index}.safetensors") for index in range(2)]
    for path, tensor in zip(paths, tensors, strict=True):
        save_file({"w": tensor}, path)
    config = {"merge_method": "karcher", "models": [{"model": path} for path in paths]}
    outcome = merge(config | {"out_dtype": "float16"}, command="mergekit-pytorch")
    assert_stopped(
        outcome,
        f"The mean of w is beyond 65504 at [0], {BEYOND}",
        "out_dtype: bfloat16",
        "magnitude: linear",
    )


def test_a_metric_can_make_a_mean_too_large_as_well():
    first = torch.tensor([LARGE, LARGE]).half()
    second = torch.tensor([LARGE, -LARGE]).half()
    metric = torch.tensor([1e-6, 1e-6]).double()
    tilted = torch.tensor([1e-6, 2e-6]).double()
    with pytest.raises(KarcherError, match=BEYOND):
        karcher_mean([first, second], metrics=[metric, tilted])


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("with_metrics", [False, True])
def test_inputs_are_free_after_the_backward_pass(granularity, with_metrics):
    """The result is kept, what it was made of is not."""
    generator = torch.Generator().manual_seed(4)
    leaves = [torch.randn(6, 5, generator=generator).requires_grad_() for _ in range(3)]
    base = torch.randn(6, 5, generator=generator)
    metrics = [torch.rand(6, 5, generator=generator) for _ in leaves] if with_metrics else None
    inputs = [leaf * 2 for leaf in leaves]
    result, _ = karcher_mean(inputs, base=base, granularity=granularity, metrics=metrics)
    watched = [weakref.ref(tensor) for tensor in (*inputs, base, *(metrics or ()))]
    (result**2).sum().backward()
    del inputs, base, metrics
    gc.collect()
    assert [reference() for reference in watched] == [None] * len(watched)
    assert all(leaf.grad is not None for leaf in leaves)
    assert torch.isfinite(result).all()


CHANGED = """
import torch
from mergekit_karcher import karcher_mean
leaves = [torch.randn(4, 3).requires_grad_() for _ in range(2)]
inputs = [leaf * 2 for leaf in leaves]
merged, _ = karcher_mean(inputs)
with torch.no_grad():
    inputs[0].mul_(3)
try:
    merged.sum().backward()
except RuntimeError as error:
    print("modified by an inplace operation" in str(error))
"""


def test_inputs_changed_in_place_are_noticed_without_asserts():
    assert run(CHANGED, "-O") == run(CHANGED) == "True"


@pytest.mark.parametrize("others", [1, 2])
def test_elements_that_no_model_is_sure_of_get_the_weighted_mean_without_a_floor(others):
    rng = np.random.default_rng(5)
    count = 1 + others
    optima = rng.standard_normal((count, 3000))
    metrics = np.exp(rng.standard_normal((count, 3000)))
    metrics[:, ::7] = 0
    weights = np.arange(1.0, count + 1)
    found = fisher_mean(
        [torch.as_tensor(o) for o in optima],
        [torch.as_tensor(g) for g in metrics],
        weights.tolist(),
        floor=0,
    ).numpy()
    linear = weights @ optima / weights.sum()
    np.testing.assert_allclose(found[::7], linear[::7], rtol=1e-14, atol=1e-15)
    sure = np.arange(3000) % 7 != 0
    precise = (weights[:, None] * metrics * optima).sum(0)[sure] / (weights @ metrics)[sure]
    np.testing.assert_allclose(found[sure], precise, rtol=1e-12, atol=1e-15)
    merged, _ = karcher_mean(
        [torch.as_tensor(o) for o in optima],
        weights.tolist(),
        metrics=[torch.as_tensor(g) for g in metrics],
        floor=0,
    )
    assert torch.isfinite(merged).all()
