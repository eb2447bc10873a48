"""The one frame of every pass: pieces, workers, their scratch, and what they add up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from mergekit_karcher.kernels.chunks import Piece, walk, working_device
from mergekit_karcher.kernels.workers import in_stripes, worker_count

Tensors = list[torch.Tensor]

# Is called with a piece, that piece of every tensor, the scratch of its worker, and the sums that
# its worker adds to.
Kernel = Callable[[Piece, Tensors, Tensors, torch.Tensor], None]


def stream(
    kernel: Kernel,
    tensors: Sequence[torch.Tensor],
    limit: int,
    *,
    out: torch.Tensor | None = None,
    scratch: Sequence[tuple[int, ...]] = (),
    scratch_dtype: torch.dtype = torch.float64,
    sums: tuple[int, ...] = (0,),
    by_row: bool = False,
) -> torch.Tensor:
    """Call a kernel on every piece of some tensors, in as many threads as the device has use for.

    Arguments:
        kernel: The work on one piece. It gets that piece of each tensor as a view, the piece of
            out last.
        tensors: What is read, of one shape and device, any dtypes and strides. Borrowed.
        limit: The most elements a piece has, of each tensor.
        out: What the kernel fills, if it fills a tensor, of the same shape and device.
        scratch: The shapes of the buffers that every worker has to itself. What is in them
            at first is arbitrary, later what the worker's last piece has left there.
        scratch_dtype: The dtype of these buffers.
        sums: The shape of what a worker adds up over its pieces. It starts as zeros.
        by_row: Whether pieces keep the first axis; see `walk`.

    Returns:
        The sums of all W workers, (W, *sums), float64, on the working device.
    """
    device = working_device(tensors[0].device)
    walked = [*tensors, *(() if out is None else (out,))]
    views, pieces = walk(walked, limit, by_row=by_row)
    workers = worker_count(device, len(pieces))
    buffers = [
        torch.empty(workers, *shape, dtype=scratch_dtype, device=device) for shape in scratch
    ]
    totals = torch.zeros(workers, *sums, dtype=torch.float64, device=device)

    def work(worker: int, stripe: Sequence[Piece]) -> None:
        room, total = [buffer[worker] for buffer in buffers], totals[worker]
        for piece in stripe:
            kernel(piece, [piece.of(view) for view in views], room, total)

    in_stripes(work, pieces, device, len(tensors) * tensors[0].numel())
    return totals


def shaped_as(part: torch.Tensor, buffers: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The start of each buffer, in the shape of part."""
    return [buffer[: part.numel()].view(part.shape) for buffer in buffers]
