"""A network without weights, whose parts are given theirs when they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.host.network_weights import NetworkWeights
from mergekit_karcher.metrics.model import class_of
from mergekit_karcher.metrics.store import names_in_checkpoint, tied_names


class Skeleton:
    """A network of transformers whose parameters are on the meta device until they are loaded.

    Arguments:
        reference: A model in a folder or on the Hub.
        device: Where its weights go.

    Raises:
        KarcherError: If it is no such model, or its checkpoint cannot be opened.
    """

    def __init__(self, reference: str, device: torch.device) -> None:
        from accelerate import init_empty_weights  # type: ignore[import-untyped]

        self.reference, self.device = reference, device
        config, model_class = class_of(reference)
        try:
            # Buffers are computed, not loaded: they must be real.
            with init_empty_weights(include_buffers=False):
                model = model_class(config)
        except Exception as error:
            raise KarcherError(
                f"{reference} cannot be made from its config ({first_line(error)})."
            ) from None
        model.tie_weights()
        if model._can_set_experts_implementation():
            # The others compute all experts in one kernel, where nobody sees the inputs of each.
            model.set_experts_implementation("eager")
        self.model: nn.Module = model.eval().requires_grad_(False)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self.weights = NetworkWeights(reference, config.model_type)
        self._tied = tied_names(self.model)

    def names(self, name: str) -> list[str]:
        """What the checkpoint may call a parameter of the network."""
        return names_in_checkpoint(name, self.model, self._tied)

    def sources(self, name: str) -> list[str]:
        """What a parameter of the network is read from."""
        return self.weights.sources(self.names(name))

    def layers(self, name: str) -> list[list[str]]:
        """What each layer of a weight is read from: each expert of a stack, or all of it."""
        return self.weights.layers(self.names(name))

    @property
    def copies(self) -> set[str]:
        """What the checkpoint may call parameters that are tied to others."""
        return {other for name in self._tied for other in self.names(name)}

    def load(self, names: Iterable[str]) -> None:
        """Read parameters, and the buffers beside them that the checkpoint has, in float32.

        Raises:
            KarcherError: If the checkpoint lacks one, or its shape is not that of the config.
        """
        for name in names:
            place, leaf = self._place(name)
            expected = place._parameters[leaf]
            tensor = self._read(name)
            if tensor is None:
                raise KarcherError(
                    f"{self.reference} lacks {name} of a {type(self.model).__name__}: it would be "
                    "made up at random; name a model that has all of its weights."
                )
            if expected is None or tensor.shape != expected.shape:
                raise KarcherError(
                    f"{name} of {self.reference} has not the shape that its config says: name a "
                    "model whose config and weights belong together."
                )
            loaded = nn.Parameter(self._copied(tensor), requires_grad=False)
            for other in self._tied.get(name, [name]):
                place, leaf = self._place(other)
                place._parameters[leaf] = loaded
            for buffer, value in self._buffers_beside(name):
                tensor = self._read(buffer)
                if tensor is not None:
                    value.copy_(tensor.to(self.device, value.dtype))

    def unload(self, names: Iterable[str]) -> None:
        """Free the memory of parameters."""
        for name in names:
            place, leaf = self._place(name)
            loaded = place._parameters[leaf]
            if loaded is not None:
                place._parameters[leaf] = nn.Parameter(loaded.to("meta"), requires_grad=False)

    def _read(self, name: str) -> torch.Tensor | None:
        return self.weights.read(self.names(name))

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        # Always a copy: a tensor that is mapped from its file may share its storage with others.
        return tensor.to(self.device, torch.float32, copy=True)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def _buffers_beside(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The buffers in the module of a parameter that are saved with its network, by name."""
        path, dot, _ = name.rpartition(".")
        place = self.model.get_submodule(path)
        transient: Any = place._non_persistent_buffers_set
        for leaf, buffer in place.named_buffers(recurse=False):
            if leaf not in transient:
                yield f"{path}{dot}{leaf}", buffer
