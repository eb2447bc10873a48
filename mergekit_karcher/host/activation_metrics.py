"""Reading the metrics that `mergekit-karcher fisher --kind activations` makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mergekit.architecture.conversion import convert_checkpoint_tensors

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.network_weights import layers_of
from mergekit_karcher.means.input_gram import InputGram

KIND = "activations"
SCHEMA = "mergekit-karcher/metric/1"


class ActivationMetrics:
    """The metrics of one model from what its weights are multiplied with, read when asked for.

    Arguments:
        loader: mergekit's loader of the folder's tensors.
        about: What its metric.json says.
        reference: Where it is, for messages.

    Raises:
        KarcherError: If it was written by another version in another way, or is not whole.
    """

    def __init__(self, loader: Any, about: Mapping[str, Any], reference: str) -> None:
        missing = {"grams", "unused", "shapes", "ones"} - set(about)
        if about.get("schema") != SCHEMA or missing:
            raise KarcherError(
                f"The metric {reference} has schema {about.get('schema')}, but this version of "
                f"mergekit-karcher reads {SCHEMA}: make it anew from its model."
            )
        self._loader, self._reference = loader, reference
        self._stored = set(loader.index.tensor_paths)
        self._grams: Mapping[str, str] = about["grams"]
        self._unused: Mapping[str, int] = about["unused"]
        self._shapes: Mapping[str, Sequence[int]] = about["shapes"]
        self._ones = set(about["ones"])
        entries = set(self._grams.values())
        diagonal = {n for n in self._stored if n.rpartition(".input_gram")[0] not in entries}
        self.names = dict.fromkeys(sorted({*self._grams, *self._unused, *self._ones, *diagonal}))

    def is_one(self, sources: Sequence[str]) -> bool:
        """Whether tensors of the checkpoint have a metric of one, as biases have."""
        return all(source in self._ones for source in sources)

    def is_gram(self, sources: Sequence[str]) -> bool:
        """Whether all of them are weights of linear layers."""
        return all(source in self._grams or source in self._unused for source in sources)

    def metric(
        self, tensor: str, model_type: str | None, sources: Sequence[str]
    ) -> InputGram | torch.Tensor:
        """The metric of a tensor.

        Arguments:
            tensor: Its name.
            model_type: Of the family that puts it together from others; None if it is as it is.
            sources: What it is put together from.

        Returns:
            An `InputGram` for linear layers, of stacked experts a stack; for embeddings and norms a
            diagonal metric of the tensor's shape.

        Raises:
            KarcherError: If it cannot be put together.
        """
        if not self.is_gram(sources):
            if model_type is None:
                return self._diagonal(tensor)
            parts = {name: partial(self._diagonal, name) for name in sources}
            whole = convert_checkpoint_tensors(model_type, parts, tensor)
            if not isinstance(whole, torch.Tensor):
                raise self._not_of_one(tensor)
            return whole
        if model_type is None or len(sources) == 1:
            return self._gram(sources[0])
        entry_of = {name: self._grams.get(name, name) for name in sources}
        # Each is read once, whatever the number of tensors that share it.
        name_of = {entry: name for name, entry in entry_of.items()}
        grams = {entry: self._gram(name) for entry, name in name_of.items()}
        axes = {name: len(grams[entry].shape) for name, entry in entry_of.items()}
        layers = [sources] if 3 in axes.values() else layers_of(model_type, tensor, axes)
        entries = [{entry_of[name] for name in layer} for layer in layers]
        if any(len(of_layer) > 1 for of_layer in entries):
            raise self._not_of_one(tensor)
        of_layers = [grams[entry] for (entry,) in entries]
        return of_layers[0] if len(layers) == 1 else _stacked(of_layers)

    def _not_of_one(self, tensor: str) -> KarcherError:
        return KarcherError(
            f"{tensor} is put together from parts that do not share a metric in "
            f"{self._reference}: make it anew from its model."
        )

    def _diagonal(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._loader.get_tensor(name)
        return tensor.expand(*self._shapes[name]) if name in self._shapes else tensor

    def _gram(self, name: str) -> InputGram:
        if name in self._unused:
            return InputGram(factor=torch.zeros(1, self._unused[name]))
        entry, get = self._grams[name], self._loader.get_tensor
        if f"{entry}.input_gram" in self._stored:
            return InputGram(dense=get(f"{entry}.input_gram"))
        return InputGram(
            factor=get(f"{entry}.input_gram_factor"), diagonal=get(f"{entry}.input_gram_diagonal")
        )


def _stacked(grams: Sequence[InputGram]) -> InputGram:
    """Grams of experts as a stack; those that no token reached are zero."""
    used = next((gram for gram in grams if gram.trace() > 0), grams[0])

    def stack(part: str) -> torch.Tensor | None:
        like = getattr(used, part)
        if like is None:
            return None
        zero = like.new_zeros(like.shape)
        return torch.stack([getattr(g, part) if g.trace() > 0 else zero for g in grams])

    return InputGram(stack("dense"), stack("factor"), stack("diagonal"))
