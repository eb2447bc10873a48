"""A planted order is found: assignments, bounds, descent, joint matching."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import planted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import (
    FAMILIES,
    SILENT,
    align_stacks,
    aligned,
    assert_equal_states,
    everything,
    shapes_of,
)
from safetensors.torch import save_file

from mergekit_karcher.align import assign, joint, match, nested
from mergekit_karcher.align.families import stack
from mergekit_karcher.align.orders import blocks_of
from mergekit_karcher.align.symmetry import InnerMove, Inside, Move, Symmetry
from mergekit_karcher.errors import KarcherError


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_order_of_everything_is_found(family, residual):
    model = planted.hf_model(family)
    state = planted.state_of(model)
    spec = planted.specification(model, state, residual)
    moved = planted.scrambled(state, spec, 3)
    gets = [state.__getitem__, moved.__getitem__]
    orders = match.align_to_reference(spec, 0, gets, 3, 0, SILENT)
    assert orders[0] == {}
    assert_equal_states(aligned(moved, orders[1]), state)


@pytest.mark.parametrize("family", ["llama", "gpt2", "stack"])
def test_planted_orders_with_noise_are_found_jointly(family):
    if family == "stack":
        state = planted.mlp(0)
        spec = stack.specification(shapes_of(state))
    else:
        model = planted.hf_model(family)
        state = planted.state_of(model)
        spec = planted.specification(model, state)
    generator = torch.Generator().manual_seed(1)

    def noisy(tensor):
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        return tensor + 0.05 * noise * tensor.std(correction=0)

    near = [{name: noisy(tensor) for name, tensor in state.items()} for _ in range(4)]
    moved = [
        near[0],
        *(planted.scrambled(model, spec, seed) for seed, model in enumerate(near[1:])),
    ]
    orders = joint.align_jointly(spec, [model.__getitem__ for model in moved], 3, 0, SILENT)
    assert orders[0] == {}
    for model, order, expected in zip(moved, orders, near, strict=True):
        assert_equal_states(aligned(model, order), expected)


def test_the_spread_never_rises_and_no_model_is_a_favourite():
    """Independent networks: the joint spread is below that of any reference."""
    states = [planted.mlp(seed, (30, 24, 24, 6)) for seed in range(5)]
    spec = stack.specification(shapes_of(states[0]))
    gets = [state.__getitem__ for state in states]
    names = sorted(states[0])

    def spread(orders):
        products = joint.products_between(names, gets, orders)
        return joint.spread_of(joint.mean_between(products, range(5)))

    stay = spread([{}] * 5)
    references = [spread(match.align_to_reference(spec, r, gets, 2, 0, SILENT)) for r in range(5)]
    jointly = spread(joint.align_jointly(spec, gets, 3, 0, SILENT))
    assert jointly < min(references) < max(references) < stay


def test_the_same_seed_gives_the_same_orders_and_starts_help():
    states = [planted.mlp(seed, (10, 30, 30, 30, 4), (0, 1, 2, 3)) for seed in range(2)]
    spec = stack.specification(shapes_of(states[0]))
    gets = [state.__getitem__ for state in states]

    def reached(starts, seed):
        (_, orders) = match.align_to_reference(spec, 0, gets, starts, seed, SILENT)
        moved = aligned(states[1], orders)
        return sum(float((states[0][n] * moved[n]).sum()) for n in moved), orders

    value, orders = reached(4, 7)
    again, same = reached(4, 7)
    assert value == again
    assert all(torch.equal(orders[key], same[key]) for key in orders)
    assert value > reached(1, 7)[0]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_assignments_equal_those_of_trying_all(count, seed):
    rng = np.random.default_rng(seed)
    left, right = (torch.as_tensor(rng.standard_normal((count, 40))) for _ in range(2))
    order = assign.assign([left[:, :25], left[:, 25:]], [right[:, :25], right[:, 25:]])
    table = (left @ right.T).numpy()
    best = max(permutations(range(count)), key=lambda p: sum(table[i, j] for i, j in enumerate(p)))
    assert tuple(order) == best


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_bound_and_the_whole_table_agree(noise, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(50, 400, generator=generator)
    order = torch.randperm(50, generator=generator)
    right = (left + noise * torch.randn(50, 400, generator=generator))[order].to(dtype)
    left = left.to(dtype)
    whole = assign.best_order(assign.benefits([left], [right]))
    assert (assign.assign([left], [right]) == whole).all()
    if noise < 0.1:
        assert (whole == torch.argsort(order).numpy()).all()

        def never(*_):
            raise AssertionError("the bound did not decide")

        monkeypatch.setattr(assign, "benefits", never)
        assert (assign.assign([left], [right]) == whole).all()


def test_a_bound_never_lets_a_wrong_order_through():
    """Units that differ in the last columns only, which the bound has not seen."""
    same = torch.randn(20, 390)
    last = 30 * torch.eye(20, 20)
    left = torch.cat([same[:1].expand(20, -1) * 0.01, last], 1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    order_found = assign.assign([left], [left[order]])
    assert (order_found == torch.argsort(order).numpy()).all()


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e15])
def test_bounds_are_on_their_side_of_the_truth(scale):
    """Also where rows are almost equal and far from zero, where float32 rounds most."""
    generator = torch.Generator().manual_seed(6)
    shared = 100 * torch.randn(1, 64, generator=generator)
    left, right = (
        (scale * (shared + 1e-3 * torch.randn(40, 64, generator=generator))) for _ in range(2)
    )
    true = torch.cdist(left.double(), right.double()).square()
    least = assign.least_distances(
        assign.first_columns([left], 0.5), assign.first_columns([right], 0.5)
    )
    assert (least.double() <= true).all()
    exact = assign.squared_distances([left], [right], torch.arange(40))
    assert (exact >= true.diagonal() * (1 - 1e-9)).all()
    torch.testing.assert_close(exact, true.diagonal(), rtol=1e-4, atol=1e-29)


def test_units_that_are_told_apart_by_one_move_only_are_not_said_to_stay():
    """Equal inside, so that every order inside is as good: what has none decides."""
    keys, values = torch.randn(3, 2, 40), torch.randn(1, 2, 40).expand(3, 2, 40)
    moves = (Move("k", 0, 0, 2), Move("v", 0, 0, 2))
    symmetry = Symmetry("heads", 3, moves, (Inside("values", 2, (InnerMove(1),)),))
    assert nested.is_proven_best(symmetry, [keys, values], [keys, values])
    swapped = keys[[1, 0, 2]]
    assert not nested.is_proven_best(symmetry, [keys, values], [swapped, values])


def test_of_several_starts_the_least_spread_counts():
    states = [planted.mlp(seed, (12, 20, 20, 20, 5), (0, 1, 2, 3)) for seed in range(4)]
    spec = stack.specification(shapes_of(states[0]))
    gets = [state.__getitem__ for state in states]

    def spread(starts):
        orders = joint.align_jointly(spec, gets, starts, 0, SILENT)
        products = joint.products_between(sorted(states[0]), gets, orders)
        return joint.spread_of(joint.mean_between(products, range(4)))

    spreads = [spread(starts) for starts in (1, 2, 4, 8)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < spreads[0]


def test_fine_tunes_of_one_base_stay_without_a_whole_table(monkeypatch):
    model = planted.hf_model("llama")
    state = planted.state_of(model)
    spec = planted.specification(model, state)
    tuned = [
        {name: t + 0.002 * torch.randn(t.shape, dtype=t.dtype) for name, t in state.items()}
        for _ in range(3)
    ]

    def never(*_):
        raise AssertionError("a whole table was made")

    monkeypatch.setattr(assign, "benefits", never)
    monkeypatch.setattr(match, "benefits", never)
    monkeypatch.setattr(nested, "benefits", never)
    assert joint.align_jointly(spec, [t.__getitem__ for t in tuned], 3, 0, SILENT) == [{}, {}, {}]


def test_heads_that_are_not_proven_to_stay_are_not_said_to():
    spec = planted.specification(
        planted.hf_model("llama"), planted.state_of(planted.hf_model("llama"))
    )
    (heads, *_) = [s for s in spec.symmetries if s.inside]
    state = planted.state_of(planted.hf_model("llama"))
    only_heads = replace(spec, symmetries=(heads,), fixed=everything())
    swapped = planted.scrambled(state, only_heads, 4)
    blocks, other = (
        [blocks_of(s[move.tensor], move, heads.size) for move in heads.moves]
        for s in (state, swapped)
    )
    assert nested.is_proven_best(heads, blocks, blocks)
    assert not nested.is_proven_best(heads, blocks, other)


def test_a_value_that_is_not_finite_names_its_tensor(tmp_path):
    state = planted.mlp(1)
    state["2.weight"][1, 1] = torch.nan
    save_file(planted.mlp(0), tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    result = align_stacks(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--out", tmp_path / "x"
    )
    assert (result.exit_code, "2.weight is not finite" in result.stderr) == (1, True)
    model = planted.hf_model("mistral")
    good = planted.state_of(model)
    spec = planted.specification(model, good, residual=True)
    bad = {k: v.clone() for k, v in good.items()}
    bad["model.layers.1.self_attn.v_proj.weight"][0, 0] = torch.inf
    gets = [good.__getitem__, bad.__getitem__]
    with pytest.raises(KarcherError, match="is not finite everywhere in one of the models"):
        match.align_to_reference(spec, 0, gets, 1, 0, SILENT)
    zeros = {k: 0 * v for k, v in planted.mlp(2).items()}
    save_file(zeros, tmp_path / "z.safetensors")
    save_file(planted.mlp(3), tmp_path / "c.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in "acz"]
    assert align_stacks(*files, "--out", tmp_path / "x").exit_code == 0
