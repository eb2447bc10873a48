"""The first pass: all inner products of N tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_karcher.kernels.chunks import Piece, rows_of, walk, working_device
from mergekit_karcher.kernels.shared_metric import SharedMetric
from mergekit_karcher.kernels.workers import in_stripes, worker_count

# float64 elements that a thread holds, of all N tensors together. Measured on 2 cores from 2^16
# to 2^20: less pays for the calls, more falls out of the cache.
CHUNK_ELEMENTS = 1 << 19

# Elements that one matrix product sums; short sums round less.
_SUM_ELEMENTS = 4096

# Columns of the Gram matrix that one matrix product makes. Measured for N = 3 to 32 on 2 cores.
_STRIP = 4

# Bits of the leading part of a float32 or float64 value, counted from the largest in its chunk.
# 2 * 16 bits of a product and 20 of a sum over a chunk fit the 53 of float64: sums of products of
# leading parts are exact.
_LEADING_BITS = 16

# Powers of two beyond this one are not representable together with their inverse.
_LARGEST_EXPONENT = 1000


def grams(
    tensors: Sequence[torch.Tensor],
    *,
    base: torch.Tensor | None = None,
    with_base: bool = False,
    metric: SharedMetric | None = None,
    by_row: bool = False,
    exact: bool = False,
) -> tuple[NDArray[np.longdouble], NDArray[np.int64]]:
    """Inner products of N >= 1 tensors of one shape and device, any floating dtypes and strides.

    Returns G (R, N, N) and exponents e (R, N), on the host, with
    <W_ri, W_rj> = G_rij 2^(e_ri + e_rj): one matrix (R = 1) of the whole tensors, or with by_row
    one of each index of the first axis. With a base of the same shape and device, W_i is tensor i
    minus the base, rounded to float64 and subtracted a chunk at a time; with_base adds the base
    itself as one more vector, the last. With a metric the inner product is
    <x, y>_G = sum_e G_e x_e y_e: chunks are scaled by sqrt(G), in float64.

    Products of float16, bfloat16 and float32 values are exact in float64, so only their sum rounds:
    to a few units of float64 for float32, to less for 16-bit values, which leave spare bits. With
    exact, wide values are split into a leading part, whose products sum exactly, and a small rest:
    for about twice the time G is then better than float64, for any inputs. The roots of a metric
    round once, whatever exact says. float64 inputs are
    scaled by 2^-e, which keeps their squares representable; e is 0 for others. A value that is not
    finite makes its tensor's diagonal entry NaN or infinite.
    Scratch: for each thread CHUNK_ELEMENTS float64 values and 2 R N N, whatever N and the size are.
    One transfer to the host, at the end.
    """
    everything = [*tensors, *(() if base is None else (base,))]
    held, size = len(everything), tensors[0].numel()
    count = held if with_base else len(tensors)
    rows = tensors[0].shape[0] if by_row else 1
    if size == 0:
        return np.zeros((rows, count, count), np.longdouble), np.zeros((rows, count), np.int64)
    device = working_device(tensors[0].device)
    dtypes = {tensor.dtype for tensor in everything}
    # Differences have more bits than what they are of.
    split = exact and (base is not None or bool(dtypes & {torch.float32, torch.float64}))
    room = CHUNK_ELEMENTS // (held * (1 + split) + (metric is not None))
    summed = min(_SUM_ELEMENTS, size, max(1, room))
    limit = min(max(1, room // summed), math.ceil(size / summed)) * summed
    metrics = () if metric is None else metric.tensors
    views, pieces = walk([*everything, *metrics], limit, by_row=by_row)
    views, metric_views = views[:held], views[held:]
    # Rows are padded to whole sums, by less than one element a sum.
    padded = limit + (limit // summed + 1 if by_row else 0)

    scaled = torch.float64 in dtypes
    exponents = torch.zeros(rows, held, dtype=torch.float64, device=device)
    for column, view in enumerate(views) if scaled else ():
        if view.dtype == torch.float64 or base is not None:
            exponents[:, column] = _exponents(view, pieces, rows, device)
    if base is not None:
        exponents = torch.maximum(exponents, exponents[:, -1:])[:, :count]
    scales = torch.ldexp(torch.ones_like(exponents), -exponents)
    workers = worker_count(device, len(pieces))
    buffers = torch.empty(workers, 1 + split, held * padded, dtype=torch.float64, device=device)
    roots = buffers.new_empty(workers, 0 if metric is None else padded)
    sums = torch.zeros(workers, 2, rows, count, count, dtype=torch.float64, device=device)

    def add_up(worker: int, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            parts = [piece.of(view) for view in views]
            here = rows_of(piece) if by_row else slice(0, 1)
            height = here.stop - here.start
            width = parts[0].numel() // height
            # Sums of equal length, so that what pads the last one of a row is short.
            times = math.ceil(width / summed)
            used = times * (math.ceil(width / times) if by_row else summed)
            x, h = (
                buffers[worker, side, : held * height * used].view(held, height, used)
                for side in (0, -1)
            )
            x[:, :, width:].zero_()
            # One call for all N: thousands of copies a tensor would pay for the calls.
            filled = [part[:, :width].view(parts[0].shape) for part in x]
            torch._foreach_copy_(filled, parts)
            if base is not None:
                x[:-1].sub_(x[-1])
            x, h = x[:count], h[:count]
            if scaled:
                x.mul_(scales[here].T[:, :, None])
            if metric is not None:
                root = roots[worker, : height * width].view(parts[0].shape)
                metric.roots([piece.of(view) for view in metric_views], root)
                x[:, :, :width].mul_(root.view(height, width))
            if split:
                # Adding and taking away a large number rounds to a grid.
                peak = torch.abs(x, out=h).amax(2, keepdim=True)
                exponent = torch.frexp(peak).exponent + (52 - _LEADING_BITS)
                grid = torch.ldexp(torch.full_like(peak, 1.5), exponent)
                torch.add(x, grid, out=h).sub_(grid)
                x.sub_(h)
            high, low = sums[worker, :, here]
            _add_exactly(high, low, _lower_products(h, h, times))
            if split:
                # x x' = h h' + half of (r (2h + r)' + its transpose), with r = x - h, now in x.
                h.mul_(2).add_(x)
                low.add_(_lower_products(x, h, times), alpha=0.5)
                low.add_(_lower_products(h, x, times), alpha=0.5)

    in_stripes(add_up, pieces, device, held * size)
    flat = torch.cat([sums.flatten(), exponents.flatten()]).cpu().numpy()
    host = flat[: sums.numel()].reshape(sums.shape)
    lower = np.tril(host.astype(np.longdouble).sum((0, 1)))
    symmetric = lower + np.tril(lower, -1).transpose(0, 2, 1)
    powers = flat[sums.numel() :].reshape(rows, count).astype(np.int64)
    return symmetric, powers if metric is None else powers + metric.exponent


def _lower_products(left: torch.Tensor, right: torch.Tensor, times: int) -> torch.Tensor:
    """The lower triangles of left right' for two (N, R, used) arrays, (R, N, N), in that many sums.

    In strips of columns, each from its diagonal down: less work, and what is above is not used.
    """
    count, height = left.shape[:2]
    result = left.new_zeros(height, count, count)
    rows, columns = (side.view(count, height * times, -1).transpose(0, 1) for side in (left, right))
    for start in range(0, count, _STRIP):
        strip = columns[:, start : start + _STRIP].mT
        products = torch.bmm(rows[:, start:], strip)
        products = products.view(height, times, *products.shape[1:])
        torch.sum(products, 1, out=result[:, start:, start : start + _STRIP])
    return result


def _add_exactly(high: torch.Tensor, low: torch.Tensor, part: torch.Tensor) -> None:
    """Add part to high, and what rounding takes from it to low (Knuth's TwoSum); in place."""
    total = high + part
    shadow = total - high
    low.add_((high - (total - shadow)) + (part - shadow))
    high.copy_(total)


def _exponents(
    view: torch.Tensor, pieces: Sequence[Piece], rows: int, device: torch.device
) -> torch.Tensor:
    """The powers of two at or above the largest magnitudes of the rows, (R,); 0 where all are 0."""
    workers = worker_count(device, len(pieces))
    peaks = torch.zeros(workers, rows, dtype=torch.float64, device=device)

    def peak(worker: int, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            here = rows_of(piece) if rows > 1 else slice(0, 1)
            part = piece.of(view)
            axes = tuple(range(1, part.ndim)) if here.stop - here.start == len(part) else None
            largest = torch.maximum(part.amax(axes or ()), -part.amin(axes or ()))
            target = peaks[worker, here]
            torch.maximum(target, largest.to(device), out=target)

    in_stripes(peak, pieces, device, view.numel())
    exponent = torch.frexp(peaks.amax(0)).exponent
    return exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
