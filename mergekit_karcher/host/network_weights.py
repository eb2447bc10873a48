"""The tensors of a checkpoint by the names that a network of transformers has for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from mergekit.architecture.conversion import convert_checkpoint_tensors

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host import compat
from mergekit_karcher.host.checkpoints import open_checkpoint
from mergekit_karcher.host.headers import headers_of

# Of the stand-ins for weights; many numbers divide it.
_SIDE = 12


class NetworkWeights:
    """A checkpoint that is open, whose tensors are read when they are asked for.

    Arguments:
        reference: A folder or a Hub id.
        model_type: What transformers calls the family.

    Raises:
        KarcherError: If it is nowhere, or quantised in a way that is not read.
    """

    def __init__(self, reference: str, model_type: str) -> None:
        self._model_type = model_type
        self._loader = open_checkpoint(reference).loader
        self.stored = set(self._loader.index.tensor_paths)
        self._headers = headers_of(self._loader.index)
        self._targets = compat.conversion_sources(model_type, sorted(self.stored))

    def sources(self, names: Sequence[str]) -> list[str]:
        """What a tensor is read from: one name, or more if it is put together; none if it is not.

        Arguments:
            names: What the network, or its checkpoint, may call the tensor.
        """
        direct = next((name for name in names if name in self.stored), None)
        if direct is not None:
            return [direct]
        return next((self._targets[name] for name in names if name in self._targets), [])

    def read(self, names: Sequence[str]) -> torch.Tensor | None:
        """A tensor of the network, on the CPU and in its file's dtype; None if it is not there."""
        get = self._loader.get_tensor
        sources = self.sources(names)
        if not sources or sources[0] in names:
            return get(sources[0]) if sources else None
        target = next(name for name in names if name in self._targets)
        parts = {name: partial(get, name) for name in sources}
        whole: torch.Tensor | None = convert_checkpoint_tensors(self._model_type, parts, target)
        return whole

    def axes(self, source: str) -> int:
        """How many axes a tensor of the checkpoint has."""
        return len(self._headers[source].shape)

    def layers(self, names: Sequence[str]) -> list[list[str]]:
        """The sources of each layer of a weight: of each expert of a stack, else of all of it.

        Experts that the checkpoint has stacked are one.

        Arguments:
            names: What the network, or its checkpoint, may call the weight.

        Raises:
            KarcherError: If transformers cannot put it together.
        """
        sources = self.sources(names)
        axes = {source: self.axes(source) for source in sources}
        if len(sources) == 1 or 3 in axes.values():
            return [sources]
        target = next(name for name in names if name in self._targets)
        return layers_of(self._model_type, target, axes)


def layers_of(model_type: str, target: str, axes: Mapping[str, int]) -> list[list[str]]:
    """Which tensors of a checkpoint each layer of a weight is put together from.

    Arguments:
        model_type: What transformers calls the family.
        target: The weight, as transformers calls it.
        axes: How many each of the tensors has, by name.

    Returns:
        One list for a weight of two axes, one for each expert of a stack of three.

    Raises:
        KarcherError: If transformers cannot put it together.
    """
    # transformers decides the order of experts: it is read off what it makes of numbered tensors.
    names = list(axes)
    stand_ins = {
        name: torch.full((_SIDE,) * axes[name], float(number)) for number, name in enumerate(names)
    }
    whole = convert_checkpoint_tensors(model_type, stand_ins, target)
    if whole is None:
        raise KarcherError(
            f"{target} cannot be put together from {names[0]} and others: make the metric anew "
            "from its model."
        )
    layers = whole.unbind() if whole.ndim == 3 else [whole]
    return [[names[int(number)] for number in layer.unique()] for layer in layers]
