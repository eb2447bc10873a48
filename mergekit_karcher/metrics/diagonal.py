"""The diagonal Fisher information of a language model or a classifier, example by example.

Of one example x with target y the log-likelihood is log p(y | x): for a language model the sum over
the tokens of a sequence, each given those before it. With its gradient g(x, y),

    empirical   G = mean over examples of g(x, y)^2, with the targets of the data
    true        G = mean over examples of g(x, y)^2, with y drawn from the model's own p(y | x)

(Kunstner, Balles & Hennig 2019 on the difference). It is the square of each example's own gradient
that counts: that of a batch's mean gradient would be another number.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from mergekit_karcher.errors import KarcherError

_LOG = logging.getLogger(__name__)

Gradients = Mapping[str, torch.Tensor]


class Batch(NamedTuple):
    """Examples of one length. ids: (B, T) tokens. labels: (B,) classes; None: the next tokens."""

    ids: torch.Tensor
    labels: torch.Tensor | None = None


@dataclass
class DiagonalFisher:
    """Sums of squared gradients, which grow by one batch at a time.

    model: in evaluation mode, on the device that computes; of Hugging Face's classes, or anything
    that takes input_ids (1, T) and returns logits (1, T, vocabulary), or (1, classes).
    squares: one float64 tensor for each parameter. Beside the model, memory is that of squares and
    of B gradients, B being the size of a batch.
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

    def add(self, batch: Batch, sampler: torch.Generator | None = None) -> None:
        """Add a batch; sampler, on the model's device: draw the targets from the model."""
        device = next(iter(self.parameters.values())).device
        ids = batch.ids.to(device)
        targets = ids[:, 1:] if batch.labels is None else batch.labels.to(device)[:, None]
        if sampler is not None:
            with torch.no_grad():
                drawn = [self._logits(self.parameters, own, targets[0]) for own in ids]
            chances = torch.cat(drawn).float().softmax(-1)
            targets = torch.multinomial(chances, 1, generator=sampler).view(targets.shape)
        gradient = grad(self._loss)
        if len(ids) > 1 and not self._one_by_one:
            try:
                found = vmap(gradient, in_dims=(None, 0, 0))(self.parameters, ids, targets)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                _LOG.warning(
                    "This model's gradients cannot be taken a batch at a time (%s): it goes on one "
                    "example after the other.",
                    str(error).splitlines()[0],
                )
                self._one_by_one = True
            else:
                self._add(found, lambda own: own.square().sum(0))
                self.examples += len(ids)
                return
        for own, target in zip(ids, targets, strict=True):
            self._add(gradient(self.parameters, own, target), torch.square)
            self.examples += 1

    def check(self) -> None:
        """Raise if a sum is not finite any more."""
        for name, squares in self.squares.items():
            if not math.isfinite(squares.sum()):
                raise KarcherError(
                    f"The gradients of {name} are not finite after {self.examples} examples: "
                    "repair that model, or leave out the examples that it cannot take."
                )

    def metric(self) -> dict[str, torch.Tensor]:
        """G, in float32, on the CPU."""
        return {
            name: (squares / self.examples).to("cpu", torch.float32)
            for name, squares in self.squares.items()
        }

    def _add(self, found: Gradients, square: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name, own in found.items():
            self.squares[name] += square(own)

    def _logits(
        self, parameters: Gradients, ids: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Those of one example that predict its targets, one line for each."""
        inputs = {"input_ids": ids[None]}
        output: Any = functional_call(self.model, dict(parameters), args=(), kwargs=inputs)
        logits: torch.Tensor = output.logits[0]
        return logits[: len(targets)] if logits.ndim > 1 else logits[None]

    def _loss(
        self, parameters: Gradients, ids: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        logits = self._logits(parameters, ids, targets)
        return nn.functional.cross_entropy(logits, targets, reduction="sum")
