"""The diagonal Fisher information of a language model or a classifier, example by example.

Of one example x with target y the log-likelihood is log p(y | x): for a language model the sum over
the tokens of a sequence, each given those before it. With its gradient g(x, y),

    empirical   G = mean over examples of g(x, y)^2, with the targets of the data
    true        G = mean over examples of g(x, y)^2, with y drawn from the model's own p(y | x)

(Kunstner, Balles & Hennig 2019 on the difference). Each example's gradient is squared by
itself: the square of a batch's mean gradient would be another number.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from mergekit_karcher.errors import KarcherError, first_line

_LOG = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Examples of one length.

    ids: (B, T) tokens, int64. labels: (B,) classes, int64; None where the targets are the next
    tokens.
    """

    ids: torch.Tensor
    labels: torch.Tensor | None = None


@dataclass
class DiagonalFisher:
    """Sums of squared gradients, which grow by one batch at a time.

    Arguments:
        model: In evaluation mode, on the device that computes. One of Hugging Face's classes, or
            anything that takes input_ids (1, T) and returns logits, (1, T, vocabulary) or
            (1, classes). Borrowed, never modified.
        squares: A float64 tensor for each parameter, by name, on the model's device; zeros at
            first. Owned, and added to in place.
        examples: How many examples the sums are of.

    Beside the model, memory is that of the sums, and of the gradients of every example of a batch.
    """

    model: nn.Module
    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    examples: int = 0
    _one_by_one: bool = False

    def __post_init__(self) -> None:
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        if not self.squares:
            self.squares = {
                name: torch.zeros_like(parameter, dtype=torch.float64)
                for name, parameter in self.parameters.items()
            }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.parameters.values())).device

    def add(self, batch: Batch, sampler: torch.Generator | None = None) -> None:
        """Add the squared gradient of every example of a batch.

        Arguments:
            batch: On any device.
            sampler: On the model's device: draw the targets from the model (the true Fisher)
                instead of taking those of the data (the empirical one).

        Raises:
            torch.OutOfMemoryError: If the gradients of the batch do not fit.
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
        """Refuse sums that are not finite.

        Raises:
            KarcherError: If a sum holds NaN or Inf.
        """
        for name, squares in self.squares.items():
            if not math.isfinite(squares.sum()):
                raise KarcherError(
                    f"The gradients of {name} are not finite after {self.examples} examples: "
                    "repair that model, or leave out the examples that it cannot take."
                )

    def metric(self) -> dict[str, torch.Tensor]:
        """G: the sums divided by the number of examples.

        Returns:
            A new float32 tensor on the CPU for each parameter, by name.
        """
        return {
            name: (squares / self.examples).to("cpu", torch.float32)
            for name, squares in self.squares.items()
        }

    def _drawn_targets(
        self, ids: torch.Tensor, targets: torch.Tensor, sampler: torch.Generator
    ) -> torch.Tensor:
        """Targets of the given shape, drawn from what the model predicts at their places."""
        with torch.no_grad():
            logits = [self._logits(self.parameters, example, targets[0]) for example in ids]
        chances = torch.cat(logits).float().softmax(-1)
        return torch.multinomial(chances, 1, generator=sampler).view(targets.shape)

    def _logits(
        self, parameters: Mapping[str, torch.Tensor], ids: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """The logits of one example that predict its targets, one row for each target."""
        inputs = {"input_ids": ids[None]}
        output: Any = functional_call(self.model, dict(parameters), args=(), kwargs=inputs)
        logits: torch.Tensor = output.logits[0]
        return logits[: len(targets)] if logits.ndim > 1 else logits[None]

    def _loss(
        self, parameters: Mapping[str, torch.Tensor], ids: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        logits = self._logits(parameters, ids, targets)
        return nn.functional.cross_entropy(logits, targets, reduction="sum")
