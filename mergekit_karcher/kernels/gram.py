"""The first pass: all inner products of N tensors."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_karcher.kernels.chunks import Piece, rows_of, working_device
from mergekit_karcher.kernels.shared_metric import SharedMetric
from mergekit_karcher.kernels.streaming import Tensors, stream

# float64 elements that a thread holds of all N tensors together, or twice as many float32. Measured
# on 2 cores from 2^16 to 2^20: less pays for the calls, more falls out of the cache.
CHUNK_ELEMENTS = 1 << 19

# Elements that one matrix product sums; short sums round less.
_SUM_ELEMENTS = 4096
_SINGLE_SUM_ELEMENTS = 512

# Columns of the Gram matrix that one matrix product makes. Measured for N = 3 to 32 on 2 cores.
_STRIP = 4

# Bits of the leading part of a float32 or float64 value, counted from the largest in its chunk.
# 2 * 16 bits of a product and 20 of a sum over a chunk fit the 53 of float64: sums of products of
# leading parts are exact.
_LEADING_BITS = 16

# Powers of two beyond this one are not representable together with their inverse.
_LARGEST_EXPONENT = 1000

_WIDE = (torch.float32, torch.float64)

_SINGLE_EPS = 2.0**-24


class Precision(enum.Enum):
    """What the inner products of a pass are made in.

    SINGLE: float32, for inputs of 16 bits: <x, y> is off by at most SINGLE_ERROR |x| |y|. Products
    beyond its range become infinite or zero.
    DOUBLE: float64; products of 16-bit and float32 values are exact, so only their sum rounds.
    EXACT: float32 and float64 values and differences are split into a leading part, whose products
    sum exactly, and a small rest: for about twice the time better than float64, but that the roots
    of a metric round once.
    """

    SINGLE = "single"
    DOUBLE = "double"
    EXACT = "exact"


# A sum of n products in any order, of values that were rounded once, to a product that is (Higham
# 2002, section 3.1): gamma_(n + 2) |x| |y|, with gamma_m = m u / (1 - m u). Sums of sums are in
# float64, and by Cauchy and Schwarz the |x| |y| of parts add up to no more than those of the whole.
SINGLE_ERROR = (_SINGLE_SUM_ELEMENTS + 2) * _SINGLE_EPS * (1 + 1e-4)


def grams(
    tensors: Sequence[torch.Tensor],
    *,
    base: torch.Tensor | None = None,
    with_base: bool = False,
    metric: SharedMetric | None = None,
    by_row: bool = False,
    precision: Precision = Precision.DOUBLE,
) -> tuple[NDArray[np.longdouble], NDArray[np.int64]]:
    """G (R, N, N) and exponents e (R, N), with <W_ri, W_rj> = G_rij 2^(e_ri + e_rj), on the host.

    W are N tensors of one shape and device, any floating dtypes and strides, or their differences
    from a base, which with_base adds as the last vector. In a metric inner products are
    sum_e G_e x_e y_e. R is 1, or with by_row the length of the first axis. Scaling by 2^-e keeps
    the squares of float64 inputs representable; without them and a metric e is 0. A value that is
    not finite makes its vector's diagonal entry NaN or infinite.

    SINGLE is for 16-bit tensors without a metric. Scratch: for each thread CHUNK_ELEMENTS float64
    values, or as many bytes of float32, and 2 R N N. One transfer to the host, at the end.
    """
    read = [*tensors, *(() if base is None else (base,))]
    count = len(read) if with_base else len(tensors)
    rows = tensors[0].shape[0] if by_row else 1
    if tensors[0].numel() == 0:
        return np.zeros((rows, count, count), np.longdouble), np.zeros((rows, count), np.int64)
    exponents = _exponents(read, rows, based=base is not None, by_row=by_row)[:, :count]
    sums = _sums(read, exponents, metric, precision, based=base is not None, by_row=by_row)
    flat = torch.cat([sums.flatten(), exponents.flatten()]).cpu().numpy()
    lower = np.tril(flat[: sums.numel()].reshape(sums.shape).astype(np.longdouble).sum((0, 1)))
    symmetric = lower + np.tril(lower, -1).transpose(0, 2, 1)
    powers = flat[sums.numel() :].reshape(rows, count).astype(np.int64)
    return symmetric, powers if metric is None else powers + metric.exponent


def _sums(
    read: Sequence[torch.Tensor],
    exponents: torch.Tensor,
    metric: SharedMetric | None,
    precision: Precision,
    *,
    based: bool,
    by_row: bool,
) -> torch.Tensor:
    """The lower triangles of the Gram matrices, (workers, 2, R, N, N), of vectors scaled by 2^-e.

    Of each worker those of the leading parts, and the rest. exponents: e (R, N).
    """
    rows, count = exponents.shape
    # Differences have more bits than what they are of.
    split = precision is Precision.EXACT and (based or any(one.dtype in _WIDE for one in read))
    scaled = any(tensor.dtype == torch.float64 for tensor in read)
    scales = torch.ldexp(torch.ones_like(exponents), -exponents) if scaled else None
    single = precision is Precision.SINGLE
    held = len(read) * (1 + split) + (metric is not None)
    size, room = read[0].numel(), CHUNK_ELEMENTS * (1 + single) // held
    summed = min(_SINGLE_SUM_ELEMENTS if single else _SUM_ELEMENTS, size, max(1, room))
    limit = min(max(1, room // summed), math.ceil(size / summed)) * summed  # in whole sums
    # Rows are padded to whole sums, by less than one element a sum.
    padded = limit + (limit // summed + 1 if by_row else 0)
    kernel = _InnerProducts(len(read), count, summed, scales, metric, based, split, by_row)
    return stream(
        kernel.add_piece,
        [*read, *(() if metric is None else metric.tensors)],
        limit,
        scratch=[(1 + split, len(read) * padded), (0 if metric is None else padded,)],
        scratch_dtype=torch.float32 if single else torch.float64,
        sums=(2, rows, count, count),
        by_row=by_row,
    )


@dataclass(frozen=True, eq=False)
class _InnerProducts:
    """The kernel: the inner products of one piece."""

    held: int  # how many tensors are read, the base last
    count: int  # how many vectors there are: the first of them, or all
    summed: int  # the most elements that one matrix product sums
    scales: torch.Tensor | None  # (R, count)
    metric: SharedMetric | None
    based: bool
    split: bool
    by_row: bool

    def add_piece(self, piece: Piece, parts: Tensors, scratch: Tensors, sums: torch.Tensor) -> None:
        """Add the lower triangles of the piece's Gram matrices to sums (2, R, N, N)."""
        rows = rows_of(piece) if self.by_row else slice(0, 1)
        height = rows.stop - rows.start
        width = parts[0].numel() // height
        # Sums of equal length, so that what pads the last one of a row is short.
        times = math.ceil(width / self.summed)
        used = times * (math.ceil(width / times) if self.by_row else self.summed)
        size = (self.held, height, used)
        x, h = (scratch[0][place][: math.prod(size)].view(size) for place in (0, -1))
        x[:, :, width:].zero_()
        self._fill(x, width, rows, parts, scratch[1])
        x, h = x[: self.count], h[: self.count]
        if self.split:
            _split(x, h)
        high, low = sums[:, rows]
        _add_exactly(high, low, _lower_products(h, h, times))
        if self.split:
            # x x' = h h' + half of (r (2h + r)' + its transpose), with r = x - h, now in x.
            h.mul_(2).add_(x)
            low.add_(_lower_products(x, h, times), alpha=0.5)
            low.add_(_lower_products(h, x, times), alpha=0.5)

    def _fill(
        self, x: torch.Tensor, width: int, rows: slice, parts: Tensors, root: torch.Tensor
    ) -> None:
        """Make x (N, rows, used) the vectors, in its dtype, the first width columns of it."""
        shape, height = parts[0].shape, x.shape[1]
        # One call for all N: thousands of copies a tensor would pay for the calls.
        filled = [vector[:, :width].view(shape) for vector in x]
        torch._foreach_copy_(filled, parts[: self.held])
        if self.based:
            x[:-1].sub_(x[-1])
        vectors = x[: self.count]
        if self.scales is not None:
            vectors.mul_(self.scales[rows].T[:, :, None])
        if self.metric is not None:
            root = root[: height * width].view(shape)
            self.metric.roots(parts[self.held :], root)
            vectors[:, :, :width].mul_(root.view(height, width))


def _split(x: torch.Tensor, h: torch.Tensor) -> None:
    """Make h the leading part of each value of x, and x the rest of it."""
    # Adding and taking away a large number rounds to a grid.
    peak = torch.abs(x, out=h).amax(2, keepdim=True)
    exponent = torch.frexp(peak).exponent + (52 - _LEADING_BITS)
    grid = torch.ldexp(torch.full_like(peak, 1.5), exponent)
    torch.add(x, grid, out=h).sub_(grid)
    x.sub_(h)


def _lower_products(left: torch.Tensor, right: torch.Tensor, times: int) -> torch.Tensor:
    """The lower triangles of left right' for two (N, R, used) arrays, (R, N, N), in that many sums.

    In float64, whatever the dtype of the arrays is. In strips of columns, each from its diagonal
    down: less work, and what is above is not used.
    """
    count, height = left.shape[:2]
    result = left.new_zeros(height, count, count, dtype=torch.float64)
    rows, columns = (side.view(count, height * times, -1).transpose(0, 1) for side in (left, right))
    for start in range(0, count, _STRIP):
        strip = columns[:, start : start + _STRIP].mT
        products = torch.bmm(rows[:, start:], strip)
        products = products.view(height, times, *products.shape[1:])
        torch.sum(products, 1, dtype=torch.float64, out=result[:, start:, start : start + _STRIP])
    return result


def _add_exactly(high: torch.Tensor, low: torch.Tensor, part: torch.Tensor) -> None:
    """Add part to high, and what rounding takes from it to low (Knuth's TwoSum); in place."""
    total = high + part
    shadow = total - high
    low.add_((high - (total - shadow)) + (part - shadow))
    high.copy_(total)


def _exponents(
    tensors: Sequence[torch.Tensor], rows: int, *, based: bool, by_row: bool
) -> torch.Tensor:
    """The exponents that the tensors are scaled down by, (R, number of tensors), float64.

    Of the powers of two at or above the largest magnitudes of the rows; 0 where all are 0, and for
    tensors whose squares float64 holds anyway. Differences from a base have that of the larger.
    """
    device = working_device(tensors[0].device)
    result = torch.zeros(rows, len(tensors), dtype=torch.float64, device=device)
    chosen = [index for index, tensor in enumerate(tensors) if tensor.dtype == torch.float64]
    if not chosen:
        return result
    if based:
        chosen = list(range(len(tensors)))

    def keep_largest(piece: Piece, parts: Tensors, _: Tensors, peaks: torch.Tensor) -> None:
        here = rows_of(piece) if by_row else slice(0, 1)
        for part, peak in zip(parts, peaks, strict=True):
            axes = tuple(range(1 if by_row and not piece.leading else 0, part.ndim))
            largest = torch.maximum(part.amax(axes), -part.amin(axes))
            torch.maximum(peak[here], largest.to(peak.device), out=peak[here])

    read = [tensors[index] for index in chosen]
    limit = max(1, CHUNK_ELEMENTS // len(read))
    peaks = stream(keep_largest, read, limit, sums=(len(chosen), rows), by_row=by_row).amax(0)
    exponents = torch.frexp(peaks).exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    for index, exponent in zip(chosen, exponents, strict=True):
        result[:, index] = exponent
    return torch.maximum(result, result[:, -1:]) if based else result
