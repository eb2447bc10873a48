"""The diagonal Fisher information: the mean over examples of (gradient of log p(y | x))^2.

For a language model, log p(y | x) is a sum over tokens. The targets y are those of the data
(empirical) or drawn from the model's p(y | x) (true): Kunstner, Balles & Hennig 2019. Each
gradient is squared by itself: the square of a batch's mean would be another number.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from mergekit_karcher.errors import KarcherError, first_line

Tensors = dict[str, Tensor]

_LOG = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Examples of one length.

    ids: (B, T) tokens, int64. labels: (B,) classes, int64; None where the targets are the next
    tokens.
    """

    ids: Tensor
    labels: Tensor | None = None


class DiagonalFisher:
    """The sums of squared gradients of a model, which is borrowed and never modified.

    model: in evaluation mode; takes input_ids (1, T) and returns logits, (1, T, vocabulary) or
    (1, classes). squares: a float64 sum for each parameter, by name, on the model's device.
    examples: how many they are of. Memory: the model, its sums, and a gradient for each example of
    a batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.examples, self._one_by_one = model, 0, False
        self.parameters = {name: p.detach() for name, p in model.named_parameters()}
        self.squares = {
            name: torch.zeros_like(parameter, dtype=torch.float64)
            for name, parameter in self.parameters.items()
        }
        self.device = next(iter(self.parameters.values())).device

    def add(self, batch: Batch, sampler: torch.Generator | None = None) -> None:
        """Add the squared gradient of every example of a batch, which may be on any device.

        With a sampler, on the model's device, the targets are drawn from the model (true Fisher).
        Raises torch.OutOfMemoryError if the gradients of the batch do not fit.
        """
        ids = batch.ids.to(self.device)
        targets = ids[:, 1:] if batch.labels is None else batch.labels.to(self.device)[:, None]
        if sampler is not None:
            targets = self._drawn_targets(ids, targets, sampler)
        gradient = grad(self._loss)
        if len(ids) > 1 and not self._one_by_one:
            try:
                gradients = vmap(gradient, in_dims=(None, 0, 0))(self.parameters, ids, targets)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                _LOG.warning(
                    "This model's gradients cannot be taken a batch at a time (%s): it goes on one "
                    "example after the other.",
                    first_line(error),
                )
                self._one_by_one = True
            else:
                for name, of_examples in gradients.items():
                    self.squares[name] += of_examples.square().sum(0)
                self.examples += len(ids)
                return
        for example, target in zip(ids, targets, strict=True):
            for name, of_example in gradient(self.parameters, example, target).items():
                self.squares[name] += of_example.square()
            self.examples += 1

    def check(self) -> None:
        """Raise KarcherError if a sum holds NaN or Inf."""
        for name, squares in self.squares.items():
            if not math.isfinite(squares.sum()):
                raise KarcherError(
                    f"The gradients of {name} are not finite after {self.examples} examples: "
                    "repair that model, or leave out the examples that it cannot take."
                )

    def metric(self) -> Tensors:
        """G: the sums divided by the number of examples, in new float32 tensors on the CPU."""
        return {
            name: (squares / self.examples).to("cpu", torch.float32)
            for name, squares in self.squares.items()
        }

    def _drawn_targets(self, ids: Tensor, targets: Tensor, sampler: torch.Generator) -> Tensor:
        """Targets of the given shape, drawn from what the model predicts at their places."""
        with torch.no_grad():
            logits = [self._logits(self.parameters, example, targets[0]) for example in ids]
        chances = torch.cat(logits).float().softmax(-1)
        return torch.multinomial(chances, 1, generator=sampler).view(targets.shape)

    def _logits(self, parameters: Tensors, ids: Tensor, targets: Tensor) -> Tensor:
        """The logits of one example that predict its targets, one row for each target."""
        inputs = {"input_ids": ids[None]}
        output: Any = functional_call(self.model, parameters, args=(), kwargs=inputs)
        logits: Tensor = output.logits[0]
        return logits[: len(targets)] if logits.ndim > 1 else logits[None]

    def _loss(self, parameters: Tensors, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self._logits(parameters, ids, targets)
        return nn.functional.cross_entropy(logits, targets, reduction="sum")
