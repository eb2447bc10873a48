"""The first pass: all inner products of N tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_karcher.kernels.chunks import Piece, walk, working_device
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


def gram(
    tensors: Sequence[torch.Tensor], *, exact: bool = False
) -> tuple[NDArray[np.longdouble], NDArray[np.int64]]:
    """Inner products of N >= 1 tensors of one shape and device, any floating dtypes and strides.

    Returns G (N, N) and exponents e (N,), on the host, with <W_i, W_j> = G_ij 2^(e_i + e_j).
    Products of float16, bfloat16 and float32 values are exact in float64, so only their sum rounds:
    to a few units of float64 for float32, to less for 16-bit values, which leave spare bits. With
    exact, wide values are split into a leading part, whose products sum exactly, and a small rest:
    for about twice the time G is then better than float64, for any inputs. float64 inputs are
    scaled by 2^-e, which keeps their squares representable; e is 0 for others. A value that is not
    finite makes its tensor's diagonal entry NaN or infinite.
    Scratch: for each thread CHUNK_ELEMENTS float64 values, whatever N and the size are. One
    transfer to the host, at the end.
    """
    count, size = len(tensors), tensors[0].numel()
    if size == 0:
        return np.zeros((count, count), np.longdouble), np.zeros(count, np.int64)
    device = working_device(tensors[0].device)
    split = exact and any(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors)
    room = CHUNK_ELEMENTS // (count * (1 + split))
    summed = min(_SUM_ELEMENTS, size, max(1, room))
    chunk = min(max(1, room // summed), math.ceil(size / summed)) * summed
    views, pieces = walk(tensors, chunk)

    exponents = torch.zeros(count, dtype=torch.float64, device=device)
    for row, view in enumerate(views):
        if view.dtype == torch.float64:
            exponents[row] = _exponent(view, pieces, device)
    scaled = any(view.dtype == torch.float64 for view in views)
    scales = torch.ldexp(torch.ones_like(exponents), -exponents)[:, None]
    workers = worker_count(device, len(pieces))
    buffers = torch.empty(workers, 1 + split, count, chunk, dtype=torch.float64, device=device)
    sums = torch.zeros(workers, 2, count, count, dtype=torch.float64, device=device)

    def add_up(worker: int, pieces: Sequence[Piece]) -> None:
        values, leading = buffers[worker, 0], buffers[worker, -1]
        high, low = sums[worker]
        for piece in pieces:
            parts = [piece.of(view) for view in views]
            filled = parts[0].numel()
            used = math.ceil(filled / summed) * summed
            x, h = values[:, :used], leading[:, :used]
            x[:, filled:].zero_()
            # One call for all N: thousands of copies a tensor would pay for the calls.
            torch._foreach_copy_(list(x[:, :filled].view(count, *parts[0].shape)), parts)
            if scaled:
                x.mul_(scales)
            if split:
                # Adding and taking away a large number rounds to a grid.
                peak = torch.abs(x, out=h).amax(1, keepdim=True)
                exponent = torch.frexp(peak).exponent + (52 - _LEADING_BITS)
                grid = torch.ldexp(torch.full_like(peak, 1.5), exponent)
                torch.add(x, grid, out=h).sub_(grid)
                x.sub_(h)
            _add_exactly(high, low, _lower_products(h, h, summed))
            if split:
                # x x' = h h' + half of (r (2h + r)' + its transpose), with r = x - h, now in x.
                h.mul_(2).add_(x)
                low.add_(_lower_products(x, h, summed), alpha=0.5)
                low.add_(_lower_products(h, x, summed), alpha=0.5)

    in_stripes(add_up, pieces, device, count * size)
    last = exponents.expand(1, 1, count, count)
    host = torch.cat([sums.view(-1, 1, count, count), last]).cpu().numpy()
    lower = np.tril(host[:-1, 0].astype(np.longdouble).sum(0))
    return lower + np.tril(lower, -1).T, host[-1, 0, 0].astype(np.int64)


def _lower_products(left: torch.Tensor, right: torch.Tensor, summed: int) -> torch.Tensor:
    """The lower triangle of left right' for two (N, used) matrices, summed in blocks.

    In strips of columns, each from its diagonal down: less work, and what is above is not used.
    """
    count = len(left)
    result = left.new_zeros(count, count)
    rows, columns = (side.view(count, -1, summed).transpose(0, 1) for side in (left, right))
    for start in range(0, count, _STRIP):
        strip = columns[:, start : start + _STRIP].mT
        torch.sum(torch.bmm(rows[:, start:], strip), 0, out=result[start:, start : start + _STRIP])
    return result


def _add_exactly(high: torch.Tensor, low: torch.Tensor, part: torch.Tensor) -> None:
    """Add part to high, and what rounding takes from it to low (Knuth's TwoSum); in place."""
    total = high + part
    shadow = total - high
    low.add_((high - (total - shadow)) + (part - shadow))
    high.copy_(total)


def _exponent(view: torch.Tensor, pieces: Sequence[Piece], device: torch.device) -> torch.Tensor:
    """The power of two at or above the largest magnitude, as a scalar tensor; 0 if all are zero."""

    def peak(_: int, pieces: Sequence[Piece]) -> torch.Tensor:
        parts = [piece.of(view) for piece in pieces]
        return torch.stack([torch.maximum(part.amax(), -part.amin()) for part in parts]).amax()

    peaks = in_stripes(peak, pieces, device, view.numel())
    exponent = torch.frexp(torch.stack(peaks).amax()).exponent
    return exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
