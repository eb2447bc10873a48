"""How a pass walks over tensors of one shape without ever copying a whole one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch


class Piece(NamedTuple):
    """The rows start to start + length of what the leading indices select of a tensor."""

    leading: tuple[int, ...]
    start: int
    length: int

    def of(self, view: torch.Tensor) -> torch.Tensor:
        """That piece of a tensor, as a view."""
        for index in self.leading:
            view = view.select(0, index)
        return view.narrow(0, self.start, self.length)


def rows_of(piece: Piece) -> slice:
    """The indices of the first axis that a piece lies in, of views that kept that axis."""
    start, length = (piece.leading[0], 1) if piece.leading else (piece.start, piece.length)
    return slice(start, start + length)


def walk(
    tensors: Sequence[torch.Tensor], limit: int, *, by_row: bool = False
) -> tuple[list[torch.Tensor], list[Piece]]:
    """Views of tensors of one shape, and the pieces of at most limit elements that cover each once.

    Contiguous tensors are walked flat, or with by_row as matrices that keep the first of two or
    more axes; as soon as one is strided, all keep their shape: flattening that one would copy it.
    """
    views = [tensor.detach() for tensor in tensors]
    if all(view.is_contiguous() for view in views):
        views = [view.flatten(1) if by_row else view.view(-1) for view in views]
    return views, list(_pieces(views[0].shape, limit, ()))


def _pieces(shape: Sequence[int], limit: int, leading: tuple[int, ...]) -> Iterator[Piece]:
    row = math.prod(shape[1:])
    if row > limit:
        for index in range(shape[0]):
            yield from _pieces(shape[1:], limit, (*leading, index))
    elif row > 0:
        rows = limit // row
        for start in range(0, shape[0], rows):
            yield Piece(leading, start, min(rows, shape[0] - start))


def working_device(device: torch.device) -> torch.device:
    """Where float64 sums of tensors on that device are kept; Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device
