"""Of which inputs several models changed the treatment in one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_karcher.kernels.workers import run_workers, worker_count

# Rows of a sketch, each a random sum of all output units.
ROWS = 64

# Up to so many multiplications, nothing is sketched: a sketch would take about as long.
EXACT = 1 << 25

# Elements of a model that a thread converts at once: they stay in its cache.
CHUNK_ELEMENTS = 1 << 17


@torch.no_grad()
def input_products(
    layers: Sequence[torch.Tensor], base: torch.Tensor, seed: int
) -> NDArray[np.float64]:
    """P_ij = in tr(A_i A_j) of the metrics A_k = t_k' t_k / |t_k|^2 of t_k = W_k - base, (N, N).

    P_ij / sqrt(P_ii P_jj) is the cosine between two metrics. 1 / P_kk is the part of all directions
    of its input that model k changed the layer in: 1 if all of them alike, 1 / in if only one. NaN
    for a model without a change.

    Of a large layer, `ROWS` rows y of R_k t_k stand for t_k, with a normal R_k for each model: of
    independent rows, the mean of (y_a . y_b)^2 is |t_i|^2 |t_j|^2 tr(A_i A_j), also of two rows of
    one model, so that it has no bias. What chance does to the length of a sketch cancels when
    |t_k|^2 is taken from the same rows.

    Arguments:
        layers: The N weights W_k, (out, in), of one device, floating, any strides; borrowed.
        base: What they were trained from, likewise.
        seed: Of the R_k, which are the same on every device.

    Returns:
        On the host. The work is one pass in float32, or in float64 where a weight is.
    """
    outputs, inputs = base.shape
    wide = any(tensor.dtype == torch.float64 for tensor in (*layers, base))
    dtype = torch.float64 if wide else torch.float32
    exact = outputs <= ROWS or len(layers) * outputs**2 * inputs <= EXACT
    if exact:
        rows = torch.stack([layer.to(dtype) - base.to(dtype) for layer in layers])
    else:
        rows = _sketches(layers, base, dtype, seed)
    result: NDArray[np.float64] = inputs * _traces(rows, exact).cpu().numpy()
    return result


def _sketches(
    layers: Sequence[torch.Tensor], base: torch.Tensor, dtype: torch.dtype, seed: int
) -> torch.Tensor:
    """R_k t_k of each model, (N, ROWS, in); each worker makes some of its columns."""
    outputs, inputs = base.shape
    device = base.device
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(len(layers), ROWS, outputs, generator=generator).to(device, dtype)
    result = torch.zeros(len(layers), ROWS, inputs, dtype=dtype, device=device)
    workers = worker_count(device, inputs)
    width = -(-inputs // workers)
    height = max(1, CHUNK_ELEMENTS // width)
    room = torch.empty(workers, 2, height * width, dtype=dtype, device=device)

    def work(worker: int) -> None:
        columns = slice(worker * width, min((worker + 1) * width, inputs))
        for start in range(0, outputs, height):
            rows = slice(start, start + height)
            part = base[rows, columns]
            origin, change = (buffer[: part.numel()].view(part.shape) for buffer in room[worker])
            origin.copy_(part)
            for layer, ours, sketch in zip(layers, random, result, strict=True):
                change.copy_(layer[rows, columns]).sub_(origin)
                sketch[:, columns].addmm_(ours[:, rows], change)

    run_workers(work, workers, device, len(layers) * base.numel())
    return result


def _traces(rows: torch.Tensor, exact: bool) -> torch.Tensor:
    """tr(A_i A_j), (N, N) in float64, from changes (N, out, in), or else from their sketches."""
    count, height, _ = rows.shape
    result = rows.new_zeros(count, count, dtype=torch.float64)

    def work(_: int) -> None:
        # No square is then too large or too small.
        peaks = rows.abs().amax((1, 2), keepdim=True)
        scaled = rows / torch.where(peaks > 0, peaks, 1)
        lengths = scaled.double().square().sum((1, 2))
        for place in range(count):
            others = scaled[: place + 1].flatten(0, 1)
            squares = (scaled[place] @ others.T).double().square().view(height, place + 1, height)
            sums = squares.sum((0, 2))
            if not exact:
                own = squares[:, place]
                sums[place] = (own.sum() - own.diagonal().sum()) * height / (height - 1)
            sums /= lengths[: place + 1] * lengths[place]
            result[place, : place + 1] = sums
            result[: place + 1, place] = sums

    run_workers(work, 1, rows.device, rows.numel())
    return result
