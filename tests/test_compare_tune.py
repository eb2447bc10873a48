"""The search for numbers of a merge: where they are in a config, and that it finds the least."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mergekit_karcher.compare.numbers import lengths_by_kind, numbers_of, weights_of, with_value
from mergekit_karcher.compare.tune import TRIES, tune


@pytest.mark.parametrize(("low", "high", "by_factors"), [(0.05, 2, False), (0.01, 10, True)])
def test_the_search_finds_the_least(low, high, by_factors):
    config = {"merge_method": "ties", "parameters": {"lambda": 1.0}}
    (number,) = numbers_of(config)
    number = replace(number, low=low, high=high, by_factors=by_factors)

    def cost(config):
        return (math.log(config["parameters"]["lambda"]) - math.log(0.4)) ** 2

    best, (tuned,), in_time = tune(config, [number], cost)
    assert in_time
    assert best["parameters"]["lambda"] == tuned.value == pytest.approx(0.4, rel=0.1)
    assert (tuned.before, config["parameters"]["lambda"]) == (1.0, 1.0)
    assert tuned.evaluations <= TRIES + 1


def test_a_search_without_time_keeps_the_best_so_far():
    config = {"merge_method": "ties", "parameters": {"lambda": 1.0}}
    costs = iter([1.0, 0.5, 0.7])
    best, (tuned,), in_time = tune(config, numbers_of(config), lambda _: next(costs, None))
    assert not in_time
    assert (tuned.evaluations, best["parameters"]["lambda"]) == (3, tuned.value)
    assert tune(config, numbers_of(config), lambda _: None) == (config, [], False)


def test_the_numbers_of_configs():
    models = [{"model": m, "parameters": {"weight": 2}} for m in ("a", "b", "c")]
    config = {"merge_method": "task_arithmetic", "models": models}
    second, third = weights_of(config, {"b": "short"})
    assert (second.name, third.name) == ("weight of short", "weight of c")
    assert (third.before, third.low, third.high) == (2.0, 0.0, 6.0)
    assert with_value(config, third, 5)["models"][2] == {"model": "c", "parameters": {"weight": 5}}
    assert config["models"][2]["parameters"]["weight"] == 2
    tensors = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    by_kind, numbers = lengths_by_kind(config, tensors)
    values = [{"filter": "self_attn", "value": 1}, {"filter": "mlp", "value": 1}, {"value": 1}]
    assert by_kind["parameters"]["lambda"] == values
    changed = with_value(by_kind, numbers[1], 0.3)["parameters"]["lambda"]
    assert changed == [values[0], {"filter": "mlp", "value": 0.3}, values[2]]
    by_layer = {"merge_method": "ties", "parameters": {"lambda": [0, 1]}}
    assert numbers_of(by_layer) == []
    assert [n.name for n in numbers_of({"merge_method": "slerp", "parameters": {"t": 0.5}})] == [
        "t"
    ]
