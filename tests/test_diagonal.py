"""The Fisher information by batches is that of its definition, example by example."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_models import KINDS, by_a_plain_loop, small_batch, small_model
from torch import nn

from mergekit_karcher.metrics.diagonal import Batch, DiagonalFisher


def fisher_of(model, batch, size):
    fisher = DiagonalFisher(model)
    for start in range(0, len(batch.ids), size):
        labels = None if batch.labels is None else batch.labels[start : start + size]
        fisher.add(Batch(batch.ids[start : start + size], labels))
    return fisher.metric()


# The experts of a mixture multiply in float32 at most.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mixture"])
@pytest.mark.parametrize("size", [1, 4])
def test_the_fisher_is_that_of_a_plain_loop_in_every_entry(kind, size):
    model, batch = small_model(kind, torch.float64), small_batch(kind)
    expected = by_a_plain_loop(model, batch)
    metric = fisher_of(model, batch, size)
    assert metric.keys() == expected.keys()
    for name, tensor in metric.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_every_parameter_is_right_to_five_digits(kind):
    model, batch = small_model(kind), small_batch(kind)
    reference = model if kind == "mixture" else copy.deepcopy(model).double()
    exact = by_a_plain_loop(reference, batch)
    largest = max(tensor.norm() for tensor in exact.values())
    for name, tensor in fisher_of(model, batch, 4).items():
        distance = (tensor.double() - exact[name]).norm()
        # Adding to all keys changes no softmax: their bias has a gradient of zero, and here noise.
        assert distance <= 1e-5 * exact[name].norm() + 1e-20 * largest, name


class Softmax(nn.Module):
    """A classifier of two tokens by a table: its true Fisher information is known."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.tensor([[0.3, -0.7, 1.2], [0.0, 0.4, -0.1]]).double())

    def forward(self, input_ids):
        logits = self.table[input_ids[0, 0]][None]
        return type("Output", (), {"logits": logits})


def test_the_true_fisher_draws_targets_from_the_model():
    """For logits z, E g^2 = p (1 - p): the diagonal of diag(p) - p p'."""
    model = Softmax()
    count = 20000
    batch = Batch(torch.tensor([[0, 0]]).expand(count, 2), torch.zeros(count, dtype=torch.int64))
    fisher = DiagonalFisher(model)
    fisher.add(batch, torch.Generator().manual_seed(3))
    p = model.table.detach()[0].softmax(-1)
    expected = p * (1 - p)
    # The standard error of a mean of squares of a Bernoulli difference is below 1 / sqrt(count).
    torch.testing.assert_close(
        fisher.metric()["table"][0].double(), expected, rtol=0, atol=4 / math.sqrt(count)
    )
    empirical = DiagonalFisher(model)
    empirical.add(batch)
    one_hot = torch.tensor([1.0, 0, 0]).double()
    torch.testing.assert_close(empirical.metric()["table"][0].double(), (p - one_hot) ** 2)


def test_true_targets_of_a_language_model_come_from_each_position():
    model, batch = small_model("llama"), small_batch("llama")
    first, again, other = (DiagonalFisher(model) for _ in range(3))
    for fisher, seed in ((first, 1), (again, 1), (other, 2)):
        fisher.add(batch, torch.Generator().manual_seed(seed))
    name = "lm_head.weight"
    assert torch.equal(first.metric()[name], again.metric()[name])
    assert not torch.equal(first.metric()[name], other.metric()[name])
    empirical = fisher_of(model, batch, 6)[name]
    assert 0.2 < first.metric()[name].mean() / empirical.mean() < 5


class Choosy(Softmax):
    """Decides by a value, which vmap cannot."""

    def forward(self, input_ids):
        sign = 1 if self.table.sum().item() + input_ids.sum().item() > 0 else -1
        output = super().forward(input_ids)
        output.logits = output.logits * sign
        return output


def test_a_model_that_cannot_be_batched_goes_one_by_one(caplog):
    model = Choosy()
    batch = Batch(torch.tensor([[0, 1], [1, 0], [1, 1]]), torch.tensor([0, 1, 2]))
    metric = fisher_of(model, batch, 3)
    assert "one example after the other" in caplog.text
    expected = by_a_plain_loop(model, batch)["table"]
    torch.testing.assert_close(metric["table"].double(), expected, rtol=1e-6, atol=0)
