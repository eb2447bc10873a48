"""How a pass walks over tensors of one shape without ever copying a whole one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

# What cuts a piece out of a tensor.
Index = tuple[int | slice, ...]


def walk(tensors: Sequence[torch.Tensor], limit: int) -> tuple[list[torch.Tensor], list[Index]]:
    """Views of the tensors and the indices that cut them into pieces of at most limit elements.

    Contiguous tensors are walked flat; as soon as one is strided, all keep their shape, because
    flattening that one would copy it.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = [tensor.view(-1) for tensor in tensors]
    return list(tensors), list(_pieces(tensors[0].shape, limit))


def _pieces(shape: Sequence[int], limit: int) -> Iterator[Index]:
    row = math.prod(shape[1:])
    if row > limit:
        for index in range(shape[0]):
            for rest in _pieces(shape[1:], limit):
                yield (index, *rest)
    elif row > 0:
        step = limit // row
        for start in range(0, shape[0], step):
            yield (slice(start, start + step),)


def working_device(device: torch.device) -> torch.device:
    """Where float64 sums of tensors on that device are kept; Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device
