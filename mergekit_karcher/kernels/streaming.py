"""The one frame of every pass: pieces, workers, their scratch, and what they add up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from mergekit_karcher.kernels.chunks import Piece, walk, working_device
from mergekit_karcher.kernels.workers import run_workers, worker_count

Tensors = list[torch.Tensor]

# Is called with a piece, that piece of every tensor as a view, that of the output last, the scratch
# of its worker, and the sums that its worker adds to.
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

    The tensors are only read, out is filled; all have one shape and device, any dtypes and strides.
    scratch: the shapes of the buffers of each worker, which hold what its last piece left there.
    Returns what each of W workers added to zeros, (W, *sums), float64, on the working device. limit
    and by_row are those of `walk`.
    """
    device = working_device(tensors[0].device)
    walked = [*tensors, *(() if out is None else (out,))]
    views, pieces = walk(walked, limit, by_row=by_row)
    workers = worker_count(device, len(pieces))
    room = [torch.empty(workers, *shape, dtype=scratch_dtype, device=device) for shape in scratch]
    totals = torch.zeros(workers, *sums, dtype=torch.float64, device=device)

    def work(worker: int) -> None:
        buffers, total = [buffer[worker] for buffer in room], totals[worker]
        start, stop = (len(pieces) * index // workers for index in (worker, worker + 1))
        for piece in pieces[start:stop]:
            kernel(piece, [piece.of(view) for view in views], buffers, total)

    run_workers(work, workers, device, len(tensors) * tensors[0].numel())
    return totals


def shaped_as(part: torch.Tensor, buffers: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The start of each buffer, in the shape of part."""
    return [buffer[: part.numel()].view(part.shape) for buffer in buffers]
