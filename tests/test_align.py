"""Alignment: nothing but the order changes, and a planted order is found."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_karcher.align import assign, match
from mergekit_karcher.align import repair as repairs
from mergekit_karcher.align.checkpoint import Checkpoint, write_safetensors
from mergekit_karcher.align.families import stack
from mergekit_karcher.align.symmetry import InnerMove, Inside, Move, Specification, Symmetry
from mergekit_karcher.cli.main import main
from mergekit_karcher.cli.repair import Stack
from mergekit_karcher.errors import KarcherError

FAMILIES = sorted(planted.HF)
SILENT = [].append


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def aligned(state, orders):
    return {name: match.arranged(tensor, name, orders) for name, tensor in state.items()}


def assert_equal_states(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# ---------------------------------------------------------------- nothing but the order changes


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_allowed_order_computes_the_same(family, residual):
    """All symmetries and all inside of them at random; the weights really move."""
    model = planted.hf_model(family)
    state = planted.state_of(model)
    expected = planted.logits(model, state)
    spec = planted.specification(model, state, residual)
    moved = planted.scrambled(state, spec, 1)
    for name in spec.tensors():
        assert not torch.equal(moved[name], state[name]), name
    torch.testing.assert_close(planted.logits(model, moved), expected, rtol=1e-9, atol=1e-10)


def wrong_rotary(symmetry):
    """Queries and keys in another order inside of rotary heads."""
    inside = Inside("queries and keys", symmetry.moves[1].block, (InnerMove(0), InnerMove(1)))
    return replace(symmetry, inside=(inside,))


def wrong_groups(symmetry):
    """Query heads across groups: twice as many units of half a block, keys left where they are."""
    moves = [symmetry.moves[0], symmetry.moves[3]]
    halved = tuple(move._replace(block=move.block // 2) for move in moves)
    return Symmetry("wrong", 2 * symmetry.size, halved)


def wrong_values(symmetry):
    """Values in another order without the outputs that read them."""
    return replace(symmetry, inside=(Inside("values", symmetry.moves[2].block, (InnerMove(2),)),))


@pytest.mark.parametrize("spoil", [wrong_rotary, wrong_groups, wrong_values])
def test_a_wrong_specification_is_caught_by_the_same_test(spoil):
    model = planted.hf_model("mistral")
    state = planted.state_of(model)
    expected = planted.logits(model, state)
    spec = planted.specification(model, state)
    wrong = [spoil(s) if s.name.endswith("heads") else s for s in spec.symmetries]
    moved = planted.scrambled(state, replace(spec, symmetries=tuple(wrong), fixed=everything()), 1)
    difference = (planted.logits(model, moved) - expected).abs().max()
    assert difference > 1e-3


def everything():
    return tuple(("*", axis) for axis in range(4))


def test_convolutions_with_batch_norm_compute_the_same():
    net = planted.conv_net(0)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    spec = stack.specification(shapes_of(state))
    assert [(s.size, len(s.moves)) for s in spec.symmetries] == [(8, 6), (6, 7), (10, 3)]
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = net(images)
        net.load_state_dict(planted.scrambled(state, spec, 2))
        torch.testing.assert_close(net(images), expected, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- a planted order is found


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
    moved = [near[0], *(planted.scrambled(own, spec, seed) for seed, own in enumerate(near[1:]))]
    orders = match.align_jointly(spec, [own.__getitem__ for own in moved], 3, 0, SILENT)
    assert orders[0] == {}
    for own, order, expected in zip(moved, orders, near, strict=True):
        assert_equal_states(aligned(own, order), expected)


def test_the_spread_never_rises_and_no_model_is_a_favourite():
    """Independent networks: the joint spread is below that of any reference."""
    states = [planted.mlp(seed, (30, 24, 24, 6)) for seed in range(5)]
    spec = stack.specification(shapes_of(states[0]))
    gets = [state.__getitem__ for state in states]
    names = sorted(states[0])

    def spread(orders):
        products = match.products_between(names, gets, orders)
        return match.spread_of(match.mean_between(products, range(5)))

    stay = spread([{}] * 5)
    references = [spread(match.align_to_reference(spec, r, gets, 2, 0, SILENT)) for r in range(5)]
    joint = spread(match.align_jointly(spec, gets, 3, 0, SILENT))
    assert joint < min(references) < max(references) < stay


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
    found = assign.assign([left], [left[order]])
    assert (found == torch.argsort(order).numpy()).all()


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
        assign.some_columns([left], 0.5), assign.some_columns([right], 0.5)
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
    assert match.stays(symmetry, [keys, values], [keys, values])
    swapped = keys[[1, 0, 2]]
    assert not match.stays(symmetry, [keys, values], [swapped, values])


def test_of_several_starts_the_least_spread_counts():
    states = [planted.mlp(seed, (12, 20, 20, 20, 5), (0, 1, 2, 3)) for seed in range(4)]
    spec = stack.specification(shapes_of(states[0]))
    gets = [state.__getitem__ for state in states]

    def spread(starts):
        orders = match.align_jointly(spec, gets, starts, 0, SILENT)
        products = match.products_between(sorted(states[0]), gets, orders)
        return match.spread_of(match.mean_between(products, range(4)))

    found = [spread(starts) for starts in (1, 2, 4, 8)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


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
    assert match.align_jointly(spec, [t.__getitem__ for t in tuned], 3, 0, SILENT) == [{}, {}, {}]


def test_heads_that_are_not_proven_to_stay_are_not_said_to():
    spec = planted.specification(
        planted.hf_model("llama"), planted.state_of(planted.hf_model("llama"))
    )
    (heads, *_) = [s for s in spec.symmetries if s.inside]
    state = planted.state_of(planted.hf_model("llama"))
    only_heads = replace(spec, symmetries=(heads,), fixed=everything())
    swapped = planted.scrambled(state, only_heads, 4)
    own, other = (
        [match.blocks(s[move.tensor], move, heads.size) for move in heads.moves]
        for s in (state, swapped)
    )
    assert match.stays(heads, own, own)
    assert not match.stays(heads, own, other)


# ---------------------------------------------------------------- specifications


def test_plain_stacks_are_detected():
    spec = stack.specification(shapes_of(planted.mlp(0)))
    assert [(s.name, s.size) for s in spec.symmetries] == [("0", 16), ("2", 12)]
    named = {f"net.fc{k[0]}.{k[2:]}": v for k, v in planted.mlp(0, numbers=(1, 2, 3)).items()}
    assert len(stack.specification(shapes_of(named)).symmetries) == 2


NO_STACKS = {
    "other names": ({"encoder.0.weight": (4, 3), "decoder.0.weight": (3, 4)}, "begin differently"),
    "no number": ({"first.weight": (4, 3)}, "first.weight is not the name"),
    "other widths": ({"0.weight": (4, 3), "1.weight": (2, 5)}, "reads 5 units, but 0 has 4"),
    "one layer": ({"0.weight": (4, 3)}, "no two layers"),
    "lone norm": ({"0.weight": (4, 3), "1.weight": (5,)}, "does not follow 4 units"),
}


@pytest.mark.parametrize("case", NO_STACKS)
def test_what_is_no_stack_is_refused(case):
    shapes, words = NO_STACKS[case]
    with pytest.raises(KarcherError, match=words) as caught:
        stack.specification(shapes)
    assert "--spec" in str(caught.value)


GOOD = Symmetry("a", 4, (Move("w", 0), Move("b", 0), Move("v", 1, 0, 2)))
SHAPES = {"w": (4, 3), "b": (4,), "v": (5, 8)}
FIXED = (("w", 1), ("v", 0))
BAD = {
    "no tensor": (replace(GOOD, moves=(Move("x", 0),)), "moves x, which the models do not have"),
    "no axis": (replace(GOOD, moves=(Move("w", 2),)), "moves axis 2 of w"),
    "too many": (replace(GOOD, size=5), "takes 5 blocks of 1 from 0 on axis 0 of w"),
    "block": (replace(GOOD, moves=(*GOOD.moves[:2], Move("v", 1, 1, 2))), "sizes do not agree"),
    "twice": (replace(GOOD, moves=(*GOOD.moves, Move("b", 0))), "both move the same part"),
    "unknown": (replace(GOOD, moves=GOOD.moves[:2]), "Nothing is known of axis 1 of v"),
    "in part": (
        replace(GOOD, moves=(*GOOD.moves[:2], Move("v", 1))),
        "Nothing is known of 4 of 8 places on axis 1 of v",
    ),
    "no units": (replace(GOOD, size=0), "has 0 units"),
    "inner move": (
        replace(GOOD, inside=(Inside("i", 2, (InnerMove(3),)),)),
        "refers to move 3",
    ),
    "inner size": (
        replace(GOOD, inside=(Inside("i", 3, (InnerMove(2),)),)),
        "takes 3 blocks of 1 from 0 inside blocks of 2",
    ),
    "inner twice": (
        replace(GOOD, inside=(Inside("i", 2, (InnerMove(2), InnerMove(2))),)),
        "moves the same part of a block twice",
    ),
}


def test_a_sound_specification_is_taken():
    assert Specification("x", SHAPES, (GOOD,), FIXED).tensors() == {"w", "b", "v"}


@pytest.mark.parametrize("case", BAD)
def test_an_unsound_specification_is_refused_when_built(case):
    symmetry, words = BAD[case]
    with pytest.raises(KarcherError, match=words):
        Specification("x", SHAPES, (symmetry,), FIXED)


# ---------------------------------------------------------------- the command


def run(*arguments):
    return CliRunner().invoke(main, ["align", *map(str, arguments)])


def save_hf(folder, family, state, dtype=torch.bfloat16, shard="15KB", **config):
    model = planted.HF[family]()
    for key, value in config.items():
        setattr(model.config, key, value)
    model = type(model)(model.config).to(dtype)
    model.load_state_dict({k: v.to(dtype) for k, v in state.items()}, strict=False)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture
def two_models(tmp_path):
    """One Mistral model, sharded, bf16, with a tokenizer file, and the same in another order."""
    model = planted.hf_model("mistral")
    state = {k: v.bfloat16() for k, v in planted.state_of(model).items()}
    moved = planted.scrambled(state, planted.specification(model, state), 6)
    for name, own in (("first", state), ("second", moved)):
        save_hf(tmp_path / name, "mistral", own)
        (tmp_path / name / "tokenizer.json").write_text('{"x": 1}')
    return tmp_path / "first", tmp_path / "second"


def test_checkpoints_are_written_whole_and_merge(two_models, tmp_path, merge):
    first, second = two_models
    out = tmp_path / "aligned"
    result = run(first, second, "--out", out)
    assert result.exit_code == 0, result.output
    assert_equal_states(weights_of(out / "second"), weights_of(first))
    assert_equal_states(weights_of(out / "first"), weights_of(first))
    for name in ("first", "second"):
        files = {path.name for path in (out / name).iterdir()}
        assert files == {path.name for path in (tmp_path / name).iterdir()}
        assert len([file for file in files if file.endswith(".safetensors")]) > 2
        loaded = AutoModelForCausalLM.from_pretrained(out / name)
        assert loaded.dtype == torch.bfloat16
    assert not list(out.glob("*.partial"))
    words = " ".join(result.output.split())
    assert "degrees before, 0 after" in words
    config = yaml.safe_load((out / "config.yml").read_text())
    assert config["merge_method"] == "karcher"
    merged = merge(config).weights
    for name, tensor in weights_of(first).items():
        torch.testing.assert_close(merged[name], tensor, rtol=2**-7, atol=0)


def test_an_alignment_can_be_applied_again(two_models, tmp_path):
    first, second = two_models
    out, again = tmp_path / "aligned", tmp_path / "again"
    assert run(first, second, "--out", out, "--quiet").output == ""
    stored = json.loads((out / "alignment.json").read_text())
    assert stored["schema"] == "mergekit-karcher/alignment/1"
    assert stored["reference"] == "first"
    assert stored["models"]["first"] == {}
    result = run(first, second, "--out", again, "--alignment", out / "alignment.json")
    assert result.exit_code == 0, result.output
    assert_equal_states(weights_of(again / "second"), weights_of(out / "second"))
    mistakes = {
        "does not fit second": stored
        | {"orders": [own[1:2] + own[1:] for own in stored["orders"]]},
        "with other symmetries than these": stored | {"specification": "0"},
        "knows no model second": stored | {"models": {"first": {}}},
        "is not an alignment of the kind": {},
    }
    for words, document in mistakes.items():
        (tmp_path / "wrong.json").write_text(json.dumps(document))
        result = run(first, second, "--out", tmp_path / "x", "--alignment", tmp_path / "wrong.json")
        assert (result.exit_code, words in result.stderr) == (1, True), result.stderr
        assert not (tmp_path / "x").exists()


def test_a_dry_run_writes_nothing(two_models, tmp_path):
    result = run(*two_models, "--out", tmp_path / "aligned", "--dry-run")
    assert result.exit_code == 0
    assert "Nothing was written" in result.output
    assert "model.layers.#.mlp" in result.output
    assert not (tmp_path / "aligned").exists()


def test_models_that_are_aligned_are_left_where_they_are(two_models, tmp_path):
    first, _ = two_models
    tuned = Path(shutil.copytree(first, tmp_path / "tuned"))
    for file in tuned.glob("*.safetensors"):
        tensors = {k: v + 0.001 * torch.randn_like(v) for k, v in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    out = tmp_path / "aligned"
    result = run(first, tuned, "--out", out)
    assert "there is nothing to do" in result.output
    assert sorted(path.name for path in out.iterdir()) == ["alignment.json", "config.yml"]
    config = yaml.safe_load((out / "config.yml").read_text())
    assert [m["model"] for m in config["models"]] == [str(first), str(tuned)]


def test_the_models_of_a_config_and_its_base_as_reference(two_models, tmp_path):
    first, second = two_models
    third = shutil.copytree(second, tmp_path / "third")
    document = {
        "merge_method": "karcher",
        "base_model": str(first),
        "models": [
            {"model": str(second), "parameters": {"weight": 2}},
            {"model": str(third)},
        ],
        "parameters": {"origin": "base"},
        "dtype": "float32",
    }
    (tmp_path / "c.yml").write_text(yaml.safe_dump(document))
    out = tmp_path / "aligned"
    result = run("--config", tmp_path / "c.yml", "--out", out)
    assert result.exit_code == 0, result.output
    written = yaml.safe_load((out / "config.yml").read_text())
    assert written["base_model"] == str(out / "first")
    assert written["models"][0] == {"model": str(out / "second"), "parameters": {"weight": 2}}
    assert written["parameters"] == {"origin": "base"}
    for name in ("second", "third"):
        assert_equal_states(weights_of(out / name), weights_of(first))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_raw_checkpoints_of_each_kind(tmp_path, suffix, merge):
    net = planted.conv_net(0)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    spec = stack.specification(shapes_of(state))
    states = [state, planted.scrambled(state, spec, 1), planted.scrambled(state, spec, 2)]
    files = []
    for index, own in enumerate(states):
        own = {k: v.contiguous() for k, v in own.items()}
        for name in own:
            if name.endswith("num_batches_tracked"):
                own[name] = own[name] + index
        path = tmp_path / f"net{index}{suffix}"
        save_file(own, path) if suffix == ".safetensors" else torch.save(own, path)
        files.append(path)
    out = tmp_path / "aligned"
    result = run(*files, "--out", out)
    assert result.exit_code == 0, result.output
    for path in files:
        written = out / path.name
        found = load_file(written) if suffix == ".safetensors" else torch.load(written)
        assert_equal_states(found, state)
    config = yaml.safe_load((out / "config.yml").read_text())
    merged = merge(config, command="mergekit-pytorch").weights
    assert int(merged["1.num_batches_tracked"]) == 7


def test_bin_shards_become_safetensors(two_models, tmp_path):
    first, second = two_models
    weights = weights_of(second)
    for file in second.glob("*.safetensors*"):
        file.unlink()
    torch.save(weights, second / "pytorch_model.bin")
    out = tmp_path / "aligned"
    assert run(first, second, "--out", out).exit_code == 0
    assert_equal_states(weights_of(out / "second"), weights_of(first))
    assert (out / "second" / "model.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(out / "second")


def test_a_specification_of_the_users_own(tmp_path):
    state = {f"branch{k[0]}_{'abc'[int(k[0]) // 2]}.{k[2:]}": v for k, v in planted.mlp(0).items()}
    names = sorted({name.rpartition(".")[0] for name in state})
    document = {
        "symmetries": [
            {
                "name": f"hidden {left}",
                "size": len(state[f"{left}.bias"]),
                "moves": [
                    {"tensor": f"{left}.weight", "axis": 0},
                    {"tensor": f"{left}.bias", "axis": 0},
                    {"tensor": f"{right}.weight", "axis": 1},
                ],
            }
            for left, right in pairwise(names)
        ],
        "fixed": [
            {"tensor": f"{names[0]}.weight", "axis": 1},
            {"tensor": f"{names[-1]}.*", "axis": 0},
        ],
    }
    (tmp_path / "spec.yml").write_text(yaml.safe_dump(document))
    from mergekit_karcher.align.symmetry import from_yaml

    spec = from_yaml(document, shapes_of(state))
    save_file(state, tmp_path / "a.safetensors")
    save_file(planted.scrambled(state, spec, 1), tmp_path / "b.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    refused = run(*files, "--out", tmp_path / "x")
    assert (refused.exit_code, "--spec" in refused.stderr) == (1, True)
    result = run(*files, "--out", tmp_path / "aligned", "--spec", tmp_path / "spec.yml")
    assert result.exit_code == 0, result.output
    assert_equal_states(load_file(tmp_path / "aligned" / "b.safetensors"), state)
    (tmp_path / "spec.yml").write_text("symmetries: 3")
    broken = run(*files, "--out", tmp_path / "x", "--spec", tmp_path / "spec.yml")
    assert (broken.exit_code, "The specification is not one" in broken.stderr) == (1, True)


def test_layers_of_a_users_specification():
    from mergekit_karcher.align.symmetry import from_yaml

    shapes = {f"{i}.{t}": (4, 4) for i in range(3) for t in ("in", "out")}
    document = {
        "symmetries": [
            {
                "name": "mlp {layer}",
                "size": 2,
                "layers": 3,
                "feeds": ["{layer}.in"],
                "moves": [
                    {"tensor": "{layer}.in", "axis": 0, "block": 2},
                    {"tensor": "{layer}.out", "axis": 1, "block": 2},
                ],
                "inside": [{"name": "half", "size": 2, "moves": [{"move": 0}, {"move": 1}]}],
            }
        ],
        "fixed": [{"tensor": "*.in", "axis": 1}, {"tensor": "*.out", "axis": 0}],
    }
    spec = from_yaml(document, shapes)
    assert [s.name for s in spec.symmetries] == ["mlp 0", "mlp 1", "mlp 2"]
    assert spec.symmetries[1].moves == (Move("1.in", 0, 0, 2), Move("1.out", 1, 0, 2))
    assert spec.symmetries[2].inside[0].moves == (InnerMove(0), InnerMove(1))
    assert spec.symmetries[2].feeds == ("2.in",)
    document["symmetries"][0]["moves"][0]["blok"] = 2
    with pytest.raises(KarcherError, match="has 'blok' where only tensor, axis"):
        from_yaml(document, shapes)


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_narrower_mlps_are_filled_up_with_neurons_that_do_nothing(family, tmp_path):
    key = {"gpt2": "n_inner"}.get(family, "intermediate_size")
    narrow = planted.hf_model(family)
    wide_config = planted.HF[family]().config
    setattr(wide_config, key, (getattr(wide_config, key) or 96) + 11)
    torch.manual_seed(9)
    wide = type(narrow)(wide_config).double().eval()
    expected = planted.logits(narrow, planted.state_of(narrow))
    for name, model in (("narrow", narrow), ("wide", wide)):
        model.save_pretrained(tmp_path / name)
    out = tmp_path / "aligned"
    refused = run(tmp_path / "wide", tmp_path / "narrow", "--out", out)
    assert (refused.exit_code, "--pad fills" in refused.stderr) == (1, True)
    result = run(tmp_path / "wide", tmp_path / "narrow", "--out", out, "--pad")
    assert result.exit_code == 0, result.output
    written = json.loads((out / "narrow" / "config.json").read_text())
    assert written[key] == getattr(wide_config, key)
    padded = type(narrow).from_pretrained(out / "narrow", dtype=torch.float64).eval()
    planted.in_float64(padded)
    torch.testing.assert_close(
        planted.logits(padded, padded.state_dict()), expected, rtol=1e-9, atol=1e-10
    )


def test_padded_models_merge_at_the_common_width(tmp_path, merge):
    narrow, wide = planted.mlp(0, (20, 16, 12, 5)), planted.mlp(1, (20, 18, 15, 5))
    save_file(narrow, tmp_path / "narrow.safetensors")
    save_file(wide, tmp_path / "wide.safetensors")
    files = [tmp_path / "wide.safetensors", tmp_path / "narrow.safetensors"]
    out = tmp_path / "aligned"
    assert run(*files, "--out", out, "--pad").exit_code == 0
    found = load_file(out / "narrow.safetensors")
    assert shapes_of(found) == shapes_of(wide)
    inputs = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(forward(found, inputs), forward(narrow, inputs))
    config = yaml.safe_load((out / "config.yml").read_text())
    merged = merge(config, command="mergekit-pytorch").weights
    assert shapes_of(merged) == shapes_of(wide)


def forward(state, x):
    for number in (0, 2, 4):
        x = x @ state[f"{number}.weight"].T + state[f"{number}.bias"]
        x = x.relu() if number < 4 else x
    return x


def test_what_cannot_be_padded_is_refused(tmp_path):
    for name, change in (("a", {}), ("b", {"hidden_size": 40}), ("c", {"num_key_value_heads": 2})):
        model = planted.HF["llama"]()
        for key, value in change.items():
            setattr(model.config, key, value)
        type(model)(model.config).save_pretrained(tmp_path / name)
    result = run(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "x", "--pad")
    assert result.exit_code == 1
    assert "zeros in the residual stream would change" in result.stderr
    result = run(tmp_path / "a", tmp_path / "c", "--out", tmp_path / "x", "--pad")
    assert "padding with zeros would change what these models compute" in result.stderr


# ---------------------------------------------------------------- repair


def spread_of_hidden(state, inputs):
    """Standard deviation of every pre-activation of the first two layers."""
    found = []
    x = inputs
    for number in (0, 2):
        x = x @ state[f"{number}.weight"].T + state[f"{number}.bias"]
        found.append((x.mean(0), x.std(0, correction=0)))
        x = x.relu()
    return found


def test_repair_gives_every_unit_the_moments_of_its_parents(tmp_path):
    """The definition: after it, mean and deviation are the means of the parents'."""
    parents = [{k: v.float() for k, v in planted.mlp(seed).items()} for seed in range(3)]
    merged = {k: sum(p[k] for p in parents) / 3 for k in parents[0]}
    inputs = torch.randn(200, 20)
    files = []
    for name, state in (("merged", merged), *((f"p{i}", p) for i, p in enumerate(parents))):
        files.append(tmp_path / f"{name}.safetensors")
        save_file(state, files[-1])
    save_file({"images": inputs}, tmp_path / "data.safetensors")
    out = tmp_path / "repaired.safetensors"
    arguments = ["repair", *files, "--data", tmp_path / "data.safetensors", "--out", out]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert "2 layers, 28 hidden units" in result.stderr
    found = spread_of_hidden(load_file(out), inputs)
    wanted = [spread_of_hidden(parent, inputs) for parent in parents]
    for layer, (mean, deviation) in enumerate(found):
        target = [torch.stack([w[layer][part] for w in wanted]).mean(0) for part in (0, 1)]
        torch.testing.assert_close(mean, target[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(deviation, target[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(load_file(out)["4.weight"], merged["4.weight"])
    again = CliRunner().invoke(main, [str(a) for a in arguments])
    assert (again.exit_code, "exists: name a place" in again.stderr) == (1, True)


def test_repair_of_a_network_by_itself_changes_nothing():
    net = planted.conv_net(0)
    images = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    found = repairs.repair(net, [net, net], lambda m: m(images), ["0", "3", "8"])
    for correction in found.values():
        torch.testing.assert_close(correction.scale, torch.ones_like(correction.scale))
        assert correction.shift.abs().max() < 1e-12


def test_units_that_do_not_vary_are_not_blown_up():
    state = {k: v.float() for k, v in planted.mlp(0).items()}
    dead = {k: v.clone() for k, v in state.items()}
    dead["0.weight"][3] = 0
    nets = [Stack(("0", "2", "4"), s) for s in (dead, state)]
    found = repairs.repair(nets[0], [nets[1]], lambda m: m(torch.randn(50, 20)), ["0", "2"])
    assert found["0"].scale[3] == 1
    assert all(torch.isfinite(c.scale).all() for c in found.values())


def test_batch_norms_are_taken_anew():
    net = planted.conv_net(0)
    images = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    repairs.reestimate(net, lambda m: m(images))
    with torch.no_grad():
        first = net[0](images)
    torch.testing.assert_close(net[1].running_mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(net[1].running_var, first.var((0, 2, 3)))
    assert not any(module.training for module in net if isinstance(module, torch.nn.BatchNorm2d))
    assert net[1].momentum == 0.1


def test_repair_of_a_language_model(three_models, merge, tmp_path):
    config = {"merge_method": "linear", "models": []}
    config["models"] = [{"model": m, "parameters": {"weight": 1}} for m in three_models]
    merged = merge(config).out
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 60}" for i in range(700)))
    out = tmp_path / "repaired"
    arguments = ["repair", merged, *three_models, "--data", text, "--out", out]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    before, after = weights_of(merged), weights_of(out)
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"gate_proj", "up_proj"}
    AutoModelForCausalLM.from_pretrained(out)
    text.write_text("w1")
    shutil.rmtree(out)
    short = CliRunner().invoke(main, [str(a) for a in arguments])
    assert (short.exit_code, "at least 64" in short.stderr) == (1, True)


def test_repair_of_what_lies_between_unknown_layers_is_refused(tmp_path):
    state = planted.conv_net(0).state_dict()
    save_file(state, tmp_path / "net.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "data.safetensors")
    arguments = [
        "repair",
        *[tmp_path / "net.safetensors"] * 2,
        "--data",
        tmp_path / "data.safetensors",
        "--out",
        tmp_path / "out.safetensors",
    ]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert (result.exit_code, "no stack of linear layers alone" in result.stderr) == (1, True)


def test_repair_of_a_bare_gpt2_finds_its_modules(tmp_path, three_models):
    """Its checkpoint has h.0.mlp..., the model that is run transformer.h.0.mlp..."""
    folders = []
    for seed in range(2):
        model = planted.hf_model("gpt2", seed).float()
        folders.append(tmp_path / f"g{seed}")
        model.transformer.save_pretrained(folders[-1])
        AutoTokenizer.from_pretrained(three_models[0]).save_pretrained(folders[-1])
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 50}" for i in range(100)))
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        config["n_positions"] = 64
        (folder / "config.json").write_text(json.dumps(config))
        state = weights_of(folder)
        state["wpe.weight"] = torch.randn(64, 24)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "repaired"
    arguments = ["repair", folders[0], *folders, "--data", text, "--out", out]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    before, after = weights_of(folders[0]), weights_of(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"h.{i}.mlp.c_fc.{part}" for i in (0, 1) for part in ("weight", "bias")}


def test_repair_writes_where_it_was_told(tmp_path):
    state = {k: v.float() for k, v in planted.mlp(0).items()}
    save_file(state, tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    torch.save(torch.randn(30, 20), tmp_path / "data.pt")
    arguments = ["repair", *[tmp_path / "m.safetensors"] * 2, "--data", tmp_path / "data.pt"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--out", str(tmp_path / "m.pt")])
    assert (result.exit_code, "must end in .safetensors" in result.stderr) == (1, True)
    assert (tmp_path / "m.safetensors").read_bytes() == before


# ---------------------------------------------------------------- what must not be lost or changed


def test_nothing_that_is_there_is_written_over(two_models, tmp_path):
    first, second = two_models
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = run(first, second, "--out", tmp_path)
    assert (result.exit_code, "exists: name a new folder" in result.stderr) == (1, True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    out = tmp_path / "aligned"
    assert run(first, second, "--out", out).exit_code == 0
    assert "exists: name a new folder" in run(second, first, "--out", out).stderr


def test_a_tensor_that_only_one_model_has_is_named(tmp_path):
    with_bias, without = planted.mlp(0), planted.mlp(1)
    del without["0.bias"]
    save_file(with_bias, tmp_path / "a.safetensors")
    save_file(without, tmp_path / "b.safetensors")
    for names in (("a", "b"), ("b", "a")):
        files = [tmp_path / f"{name}.safetensors" for name in names]
        result = run(*files, "--out", tmp_path / "x")
        assert (result.exit_code, "only one of them has 0.bias" in result.stderr) == (1, True)


def test_quantised_weights_are_refused(tmp_path):
    for name in "ab":
        state = {k: (10 * v).to(torch.int8) for k, v in planted.mlp(ord(name)).items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    result = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--out", tmp_path / "x")
    assert (result.exit_code, "must be dequantised" in result.stderr) == (1, True)


def test_counts_are_reconciled_even_if_nothing_moves(tmp_path, merge):
    state = {k: v.contiguous() for k, v in planted.conv_net(0).state_dict().items()}
    for index in range(2):
        own = {k: v + index if k.endswith("tracked") else v for k, v in state.items()}
        save_file(own, tmp_path / f"n{index}.safetensors")
    out = tmp_path / "aligned"
    files = [tmp_path / f"n{index}.safetensors" for index in range(2)]
    assert run(*files, "--out", out).exit_code == 0
    config = yaml.safe_load((out / "config.yml").read_text())
    assert int(merge(config, command="mergekit-pytorch").weights["1.num_batches_tracked"]) == 7


def test_norms_over_all_units_are_not_padded_and_those_of_groups_refused():
    def shapes(width, conv):
        first = (width, 3, 3, 3) if conv else (width, 3)
        second = (4, width, 3, 3) if conv else (4, width)
        return {"0.weight": first, "1.weight": (width,), "1.bias": (width,), "2.weight": second}

    (symmetry,) = stack.specification(shapes(8, conv=False)).symmetries
    assert not symmetry.padding
    with pytest.raises(KarcherError, match="norm without running statistics after a convolution"):
        stack.specification(shapes(8, conv=True))


def test_models_called_like_words_of_the_config(two_models, tmp_path, monkeypatch):
    first, second = two_models
    monkeypatch.chdir(tmp_path)
    first.rename(tmp_path / "base")
    document = {
        "merge_method": "karcher",
        "base_model": "base",
        "models": [{"model": str(second)}],
        "parameters": {"origin": "base"},
        "tokenizer": {"source": "base"},
    }
    (tmp_path / "c.yml").write_text(yaml.safe_dump(document))
    assert run("--config", "c.yml", "--out", "aligned").exit_code == 0
    written = yaml.safe_load((tmp_path / "aligned" / "config.yml").read_text())
    assert written["parameters"] == {"origin": "base"}
    assert written["tokenizer"] == {"source": "base"}
    assert written["base_model"] == str(tmp_path / "aligned" / "base")


def test_metrics_are_carried_along(two_models, tmp_path, merge):
    """Of a model and of the same in another order, each with its metric: one metric in the end."""
    first, second = two_models
    state = weights_of(first)
    generator = torch.Generator().manual_seed(8)
    metric = {k: torch.rand(v.shape, generator=generator) for k, v in state.items()}
    spec = planted.specification(planted.hf_model("mistral"), state)
    for name, own in (("g1", metric), ("g2", planted.scrambled(metric, spec, 6))):
        (tmp_path / name).mkdir()
        own = {key: tensor.contiguous() for key, tensor in own.items()}
        save_file(own, tmp_path / name / "model.safetensors")
    shutil.copytree(tmp_path / "g2", tmp_path / "g3")
    by_filter = [
        {"filter": "mlp", "value": str(tmp_path / "g2")},
        {"filter": "norm", "value": str(tmp_path / "g3")},
        {"value": "identity"},
    ]
    document = {
        "merge_method": "fisher",
        "models": [
            {"model": str(first), "parameters": {"metric": str(tmp_path / "g1")}},
            {"model": str(second), "parameters": {"metric": by_filter}},
        ],
    }
    (tmp_path / "c.yml").write_text(yaml.safe_dump(document))
    out = tmp_path / "aligned"
    result = run("--config", tmp_path / "c.yml", "--out", out)
    assert result.exit_code == 0, result.output
    assert_equal_states(weights_of(out / "second-metric"), metric)
    config = yaml.safe_load((out / "config.yml").read_text())
    assert config["models"][0]["parameters"]["metric"] == str(tmp_path / "g1")
    carried = config["models"][1]["parameters"]["metric"]
    assert carried == [
        {"filter": "mlp", "value": str(out / "second-metric")},
        {"filter": "norm", "value": str(out / "second-metric-2")},
        {"value": "identity"},
    ]
    for name, tensor in merge(config).weights.items():
        torch.testing.assert_close(tensor, state[name], rtol=2**-7, atol=0)


def test_files_of_one_name_keep_their_endings(tmp_path):
    state = planted.mlp(0)
    save_file(state, tmp_path / "a.safetensors")
    torch.save(planted.mlp(1), tmp_path / "a.pt")
    out = tmp_path / "aligned"
    result = run(tmp_path / "a.safetensors", tmp_path / "a.pt", "--out", out)
    assert result.exit_code == 0, result.output
    stored = json.loads((out / "alignment.json").read_text())
    assert list(stored["models"]) == ["a.safetensors", "a.pt"]


def test_a_head_width_that_the_config_does_not_say(two_models, tmp_path):
    first, second = two_models
    for folder in (first, second):
        config = json.loads((folder / "config.json").read_text())
        config["head_dim"] = 3
        (folder / "config.json").write_text(json.dumps(config))
    result = run(first, second, "--out", tmp_path / "x")
    assert (result.exit_code, "Nothing is known of" in result.stderr) == (1, True)


def test_a_value_that_is_not_finite_names_its_tensor(tmp_path):
    state = planted.mlp(1)
    state["2.weight"][1, 1] = torch.nan
    save_file(planted.mlp(0), tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    result = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--out", tmp_path / "x")
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
    assert run(*files, "--out", tmp_path / "x").exit_code == 0


# ---------------------------------------------------------------- mistakes


def test_wrong_usage(two_models, tmp_path):
    first, second = two_models
    out = tmp_path / "x"
    for arguments in (
        [first],
        [],
        [first, first],
        [first, second, "--reference", "other"],
        [first, second, "--config", tmp_path / "first" / "config.json"],
        [first, f"{first}/"],
        [first, second, "--pad", "--spec", tmp_path / "first" / "config.json"],
    ):
        assert run(*arguments, "--out", out).exit_code == 2
    result = run(first, f"{second}+adapter", "--out", out)
    assert (result.exit_code, "merge the adapter" in result.stderr) == (1, True)
    missing = run(first, tmp_path / "nowhere.safetensors", "--out", out)
    assert (missing.exit_code, "There is no file" in missing.stderr) == (1, True)
    (first / "config.json").write_text('{"model_type": "mistral"}')
    assert "lack 'num_attention_heads'" in run(first, second, "--out", out).stderr
    for name in "st":
        torch.save({"state_dict": planted.mlp(0)}, tmp_path / f"{name}.pt")
    assert "by name alone" in run(tmp_path / "s.pt", tmp_path / "t.pt", "--out", out).stderr
    (first / "config.json").write_text('{"model_type": "mamba"}')
    result = run(first, second, "--out", out)
    assert "of type mamba are not known" in result.stderr
    assert not out.exists()


def test_an_interrupted_write_leaves_nothing_that_looks_whole(two_models, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Checkpoint, "_copy_rest", full)
    out = tmp_path / "aligned"
    result = run(*two_models, "--out", out)
    assert (result.exit_code, "No space left" in result.stderr) == (1, True)
    assert not (out / "config.yml").exists()
    assert all(path.name.endswith(".partial") for path in out.iterdir())


def test_the_writer_writes_what_safetensors_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 4, dtype=torch.bfloat16),
        "b": torch.tensor(7),
        "c": torch.empty(0, 2),
        "d": torch.tensor([True, False]),
        "e": torch.randn(4, 3).T,
    }
    entries = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", entries, tensors.__getitem__, {"k": "v"})
    found = load_file(tmp_path / "x.safetensors")
    assert_equal_states(found, tensors)
    assert math.prod(found["c"].shape) == 0


def test_a_tokenizer_is_copied_as_it_is(three_models, tmp_path):
    out = tmp_path / "aligned"
    result = run(*three_models, "--out", out)
    assert result.exit_code == 0, result.output
    for model in three_models:
        own = out / Path(model).name
        assert len(AutoTokenizer.from_pretrained(own)) == len(AutoTokenizer.from_pretrained(model))
