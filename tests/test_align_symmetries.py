"""Symmetries: any order that they allow leaves what a network computes as it is."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import planted
import pytest
import torch
import yaml
from planted import FAMILIES, assert_equal_states, everything, run_align, shapes_of
from safetensors.torch import load_file, save_file

from mergekit_karcher.align.families import stack
from mergekit_karcher.align.specification_file import from_document
from mergekit_karcher.align.symmetry import InnerMove, Inside, Move, Specification, Symmetry
from mergekit_karcher.errors import KarcherError


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
    spec = from_document(document, shapes_of(state))
    save_file(state, tmp_path / "a.safetensors")
    save_file(planted.scrambled(state, spec, 1), tmp_path / "b.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    refused = run_align(*files, "--out", tmp_path / "x")
    assert (refused.exit_code, "--spec" in refused.stderr) == (1, True)
    result = run_align(*files, "--out", tmp_path / "aligned", "--spec", tmp_path / "spec.yml")
    assert result.exit_code == 0, result.output
    assert_equal_states(load_file(tmp_path / "aligned" / "b.safetensors"), state)
    (tmp_path / "spec.yml").write_text("symmetries: 3")
    broken = run_align(*files, "--out", tmp_path / "x", "--spec", tmp_path / "spec.yml")
    assert (broken.exit_code, "The specification is not one" in broken.stderr) == (1, True)


def test_layers_of_a_users_specification():
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
    spec = from_document(document, shapes)
    assert [s.name for s in spec.symmetries] == ["mlp 0", "mlp 1", "mlp 2"]
    assert spec.symmetries[1].moves == (Move("1.in", 0, 0, 2), Move("1.out", 1, 0, 2))
    assert spec.symmetries[2].inside[0].moves == (InnerMove(0), InnerMove(1))
    assert spec.symmetries[2].feeds == ("2.in",)
    document["symmetries"][0]["moves"][0]["blok"] = 2
    with pytest.raises(KarcherError, match="has 'blok' where only tensor, axis"):
        from_document(document, shapes)


def test_norms_over_all_units_are_not_padded_and_those_of_groups_refused():
    def shapes(width, conv):
        first = (width, 3, 3, 3) if conv else (width, 3)
        second = (4, width, 3, 3) if conv else (4, width)
        return {"0.weight": first, "1.weight": (width,), "1.bias": (width,), "2.weight": second}

    (symmetry,) = stack.specification(shapes(8, conv=False)).symmetries
    assert not symmetry.padding
    with pytest.raises(KarcherError, match="norm without running statistics after a convolution"):
        stack.specification(shapes(8, conv=True))
