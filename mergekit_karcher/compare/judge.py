"""How good one model is on each text: bits for each window, or errors for each record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_karcher.compare.texts import Text
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.metrics.examples import Example, batches
from mergekit_karcher.metrics.model import load_model
from mergekit_karcher.runner.capacity import cores

CHOOSING, REPORTING = "choosing", "reporting"

# What each window costs, by what it is for and by its text.
Costs = Mapping[str, Mapping[str, Sequence[float]]]

# Parameters of a model from which on threads gain more than they wait for each other.
_FOR_THREADS = 20_000_000

# Tokens of a batch: more gain little, and every token has a score for each of the vocabulary.
_TOKENS = 2048


class Judge:
    """Judges models on texts, one at a time, all alike.

    A GPU computes in bfloat16, a CPU in float32, by all its cores.

    Arguments:
        texts: What to judge on.
        classifies: Whether the models are classifiers.
    """

    def __init__(self, texts: Sequence[Text], *, classifies: bool) -> None:
        self._texts, self.classifies = texts, classifies
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self._threads = cores()

    def judge(self, reference: str, purposes: Sequence[str]) -> Costs:
        """What each window costs a model.

        Arguments:
            reference: The model, in a folder.
            purposes: Which windows: CHOOSING, REPORTING or both.

        Returns:
            For a language model the bits of all tokens of a window but the first, given those
            before them in it; for a classifier 1 for each record in a wrong class, else 0.

        Raises:
            KarcherError: If it cannot be loaded, or what it says is not finite.
        """
        model: Any = load_model(reference, dtype=self.dtype, attention=None).to(self.device)
        model.config.use_cache = False
        torch.set_num_threads(self._threads if model.num_parameters() >= _FOR_THREADS else 1)
        costs = {
            purpose: {
                text.name: list(self._costs(model, getattr(text, purpose).examples))
                for text in self._texts
            }
            for purpose in purposes
        }
        for of_texts in costs.values():
            for name, values in of_texts.items():
                if not all(map(math.isfinite, values)):
                    raise KarcherError(f"{reference} gives NaN or infinity on {name}.")
        return costs

    @torch.inference_mode()
    def _costs(self, model: Any, examples: Sequence[Example]) -> Iterator[float]:
        size = max(1, _TOKENS // max(len(example.ids) for example in examples))
        for batch in batches(examples, size):
            ids = batch.ids.to(self.device)
            logits = model(input_ids=ids).logits
            if self.classifies:
                wrong = logits.argmax(-1).cpu() != batch.labels
                yield from wrong.double().tolist()
            else:
                yield from (_bits(*window) for window in zip(logits, ids, strict=True))


def _bits(logits: Tensor, ids: Tensor) -> float:
    """What it takes to tell all tokens of a window but the first: (L, V), (L,)."""
    nats = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum")
    return nats.item() / math.log(2)
