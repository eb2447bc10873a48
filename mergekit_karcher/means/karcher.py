"""Groups of tensors: Gram matrices, means, combinations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.kernels.combine import combine
from mergekit_karcher.kernels.gram import grams
from mergekit_karcher.kernels.shared_metric import SharedMetric
from mergekit_karcher.means.metric import FLOOR, shared_metric, warn_of_zeros
from mergekit_karcher.means.result import KarcherMean, gathered
from mergekit_karcher.sphere.solver import Magnitude, SphereMeans, solve_means
from mergekit_karcher.sphere.trig import Floats
from mergekit_karcher.sphere.vjp import vjp

MAX_ITER = 100
TOL = 1e-12

# Above this angle to the mean (radians), rounding errors of a Gram matrix are amplified more than
# 35 times, and float32 inputs on the CPU get an exact one after all. N orthogonal inputs are there
# from N = 35 on.
_WIDE_ANGLE = 1.4

# Gram matrix elements of the rows that are solved together: about 20 MB with all that is derived.
_ROW_ELEMENTS = 1 << 16

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Settings(NamedTuple):
    """How to merge; see `karcher_mean`."""

    granularity: Literal["tensor", "row", "model"] = "tensor"
    magnitude: Magnitude = Magnitude.ARITHMETIC
    max_iter: int = MAX_ITER
    tol: float = TOL


class Group(NamedTuple):
    """The inputs of one output tensor, N or fewer; the base and the metric of their mean."""

    name: str
    tensors: Sequence[torch.Tensor]
    labels: Sequence[str]
    base: torch.Tensor | None = None
    metric: SharedMetric | None = None


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products of the N inputs of a group: grams (R, N, N) and exponents (R, N) of two.

    Where they are watched around a base, that is one more, the last.
    """

    grams: NDArray[np.longdouble]
    exponents: NDArray[np.int64]

    def first(self, count: int) -> Products:
        """Those of the first so many vectors."""
        return Products(self.grams[:, :count, :count], self.exponents[:, :count])

    def over_rows(self) -> Products:
        """One matrix for all rows together."""
        exponents = self.exponents.max(0, keepdims=True)
        shift = self.exponents - exponents
        scaled = np.ldexp(self.grams, shift[:, :, None] + shift[:, None, :])
        return Products(scaled.sum(0, keepdims=True), exponents)


# Is told the inner products of a group, whole tensors, as soon as they are known.
Watch = Callable[[Group, Products], None]


def karcher_mean(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    *,
    base: torch.Tensor | None = None,
    granularity: Literal["tensor", "row"] = "tensor",
    magnitude: Literal["arithmetic", "linear", "geometric"] = "arithmetic",
    metrics: Sequence[torch.Tensor | None] | None = None,
    floor: float = FLOOR,
    pad: bool = False,
    max_iter: int = MAX_ITER,
    tol: float = TOL,
) -> tuple[torch.Tensor, KarcherMean]:
    """The weighted Karcher mean of N tensors.

    Direction: the point of the unit sphere with the least weighted sum of squared angles to the
    inputs (Ye 2025, equation 9).

    tensors: N >= 1 of one shape and device; float16, bfloat16, float32 or float64, mixed as
        you like, strided or not. Borrowed: never modified, and the result shares no memory.
    weights: N finite numbers >= 0, not all zero; default all equal. An input of weight zero is
        left out entirely.
    base: the origin of the sphere, one more tensor of that kind: the mean is that of the
        differences W_i - base, added to the base. Default: around zero.
    granularity: "tensor" takes each tensor as one vector; "row" each index of its first axis by
        itself, and tensors of fewer than two axes whole.
    magnitude: the length, from w_i that sum to one: "arithmetic", sum_i w_i |W_i| (equation 6);
        "linear", |sum_i w_i W_i|; "geometric", prod_i |W_i|^(w_i).
    metrics: one for each input, of its shape and device, floating, finite and >= 0; None is one
        everywhere. Angles and lengths are then those of the metric that the inputs share,
        G = sum_i w_i (G_i + floor mean(G_i)): <x, y>_G = sum_e G_e x_e y_e. The scale of all of
        them says nothing, and entries that are all the same give the mean without metrics.
    floor: as a fraction of each metric's own mean, what is added to it.
    pad: fill tensors whose shapes differ up with zeros, at the end of each axis, to the largest
        size of it (paper, section 6.2); copies are made of those that need it.
    max_iter: steps at most; a handful suffices. tol: radians, the longest tangent step that
        counts as converged.

    Returns the mean, of the promoted dtype and rounded once, and a `KarcherMean` that says how it
    was found. Gradients flow to every input that requires one, none to metrics. Scratch memory is
    bounded whatever N and the size are, but for N coefficients a row. Raises `KarcherError` for
    anything it cannot merge.
    """
    tensors = list(tensors)
    values = [1.0] * len(tensors) if weights is None else [float(w) for w in weights]
    labels = [f"input {index}" for index in range(len(tensors))]
    if granularity not in ("tensor", "row"):
        raise KarcherError(f"granularity is {granularity!r}: give tensor or row.")
    if magnitude not in [kind.value for kind in Magnitude]:
        raise KarcherError(f"magnitude is {magnitude!r}: give arithmetic, linear or geometric.")
    if pad:
        if metrics is not None:
            metrics = [
                _wide(metric, _common_shape([*tensors, base]))
                if metric is not None and metric.shape == tensor.shape
                else metric
                for metric, tensor in zip(metrics, tensors, strict=False)
            ]
        *tensors, base = _padded([*tensors, base])
    settings = Settings(granularity, Magnitude(magnitude), max_iter, tol)
    group = Group("the tensor", tensors, labels, base)
    if metrics is not None:
        check_weights(values, labels, group.name)
        group, seen = in_metric(group, metrics, values, floor)
        if not seen:
            warn_of_zeros(group.name)
        if group.metric is not None and floor == 0 and any(t.requires_grad for t in tensors):
            raise KarcherError("Gradients through a mean in a metric need a floor above 0.")
    (merged,), mean = merge([group], values, settings)
    return merged, mean


def _padded(tensors: Sequence[torch.Tensor | None]) -> list[Any]:
    shape = _common_shape(tensors)
    return [None if tensor is None else _wide(tensor, shape) for tensor in tensors]


def _common_shape(tensors: Sequence[torch.Tensor | None]) -> list[int]:
    given = [tensor for tensor in tensors if tensor is not None]
    if len({tensor.ndim for tensor in given}) > 1:
        axes = " and ".join(str(n) for n in sorted({tensor.ndim for tensor in given}))
        raise KarcherError(
            f"The tensors have {axes} axes: padding makes axes longer, it does not add any."
        )
    return [max(sizes) for sizes in zip(*(tensor.shape for tensor in given), strict=True)]


def _wide(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if list(tensor.shape) == shape:
        return tensor
    # torch counts axes from the last one, and gives each its room before and after.
    more = zip(reversed(tensor.shape), reversed(shape), strict=True)
    room = [size for own, wanted in more for size in (0, wanted - own)]
    return torch.nn.functional.pad(tensor, room)


def merge(
    groups: Sequence[Group],
    weights: Sequence[float],
    settings: Settings,
    watch: Watch | None = None,
) -> tuple[list[torch.Tensor], KarcherMean]:
    """One output for each group, N inputs of the same weights in each.

    With granularity model the groups are the parts of N vectors, each tensor of which counts once,
    as many groups as it may be in; otherwise there is one group. watch is told of inputs that have
    a weight.
    """
    job = _job(groups, weights, settings, watch)
    *merged, mean = _Merge.apply(job, *job.tensors())  # type: ignore[no-untyped-call]
    return merged, expanded(mean, positive(weights), len(weights))


def in_metric(
    group: Group,
    metrics: Sequence[torch.Tensor | None],
    weights: Sequence[float],
    floor: float,
    *,
    whole: bool = False,
) -> tuple[Group, bool]:
    """A group whose mean is taken in the metric that its inputs share; whether that is not zero.

    A flat one, zeros too, changes no mean, and is left out; whole: unless this is a part of larger
    vectors, where it weighs that part against the others.
    """
    shared = shared_metric(
        group.tensors, metrics, weights, floor=floor, labels=group.labels, name=group.name
    )
    seen = bool(shared.tensors) or shared.constant > 0
    return group._replace(metric=shared) if shared.tensors or whole else group, seen


def measure(
    group: Group, weights: Sequence[float], settings: Settings, watch: Watch | None
) -> KarcherMean:
    """The mean that `merge` would combine, without the output."""
    job = _job([group], weights, settings, watch)
    return expanded(job.mean(), positive(weights), len(weights))


def _job(
    groups: Sequence[Group], weights: Sequence[float], settings: Settings, watch: Watch | None
) -> _Job:
    check_stopping(settings.max_iter, settings.tol)
    for group in groups:
        check_weights(weights, group.labels, group.name)
    chosen = positive(weights)
    taking_part = [taking(group, chosen) for group in groups]
    return _Job(taking_part, np.array([weights[index] for index in chosen]), settings, watch)


def positive(weights: Sequence[float]) -> list[int]:
    """The inputs that have a weight."""
    return [index for index, weight in enumerate(weights) if weight > 0]


def taking(group: Group, chosen: Sequence[int]) -> Group:
    """The group of some of its inputs; raises unless they can be merged."""
    some = group._replace(
        tensors=[group.tensors[index] for index in chosen],
        labels=[group.labels[index] for index in chosen],
    )
    _check_tensors(some)
    return some


def chosen_of(mean: KarcherMean, chosen: Sequence[int]) -> KarcherMean:
    """The same for the chosen inputs only."""
    index = list(chosen)
    return replace(mean, coefficients=mean.coefficients[..., index], angles=mean.angles[index])


def expanded(mean: KarcherMean, chosen: Sequence[int], count: int) -> KarcherMean:
    """The mean of count inputs of which only the chosen have a weight."""
    if len(chosen) == count:
        return mean
    coefficients = np.zeros((*mean.coefficients.shape[:-1], count))
    angles = np.full(count, np.nan)
    coefficients[..., chosen] = mean.coefficients
    angles[chosen] = mean.angles
    return replace(mean, coefficients=coefficients, angles=angles)


def products_of(
    group: Group, *, with_base: bool = False, by_row: bool = False, exact: bool = False
) -> Products:
    """The inner products of the inputs of a group, or of their differences from its base.

    with_base: and, if there is one, those of the base itself.
    """
    with_base = with_base and group.base is not None
    found = Products(
        *grams(
            group.tensors,
            base=group.base,
            with_base=with_base,
            metric=group.metric,
            by_row=by_row,
            exact=exact,
        )
    )
    finite = np.isfinite(np.diagonal(found.grams, axis1=1, axis2=2)).all(0)
    for index in np.flatnonzero(~finite).tolist():
        for tensor, label in ((group.tensors[index], group.labels[index]), (group.base, "base")):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise _not_finite(tensor, label, group.name)
        raise KarcherError(
            f"The difference of {group.name} of {group.labels[index]} from the base is not finite: "
            "repair or leave out that model, or give it a weight of 0."
        )
    return found


def total(parts: Sequence[Products]) -> Products:
    """The inner products of vectors that consist of those parts."""
    exponents = np.max([part.exponents for part in parts], axis=0)
    summed = np.zeros(parts[0].grams.shape, np.longdouble)
    for part in parts:
        shift = part.exponents - exponents
        summed += np.ldexp(part.grams, shift[:, :, None] + shift[:, None, :])
    return Products(summed, exponents)


def mean_of_products(
    products: Products, weights: Sequence[float] | Floats, settings: Settings
) -> KarcherMean:
    """The mean of N vectors, all of them with a weight, from their inner products."""
    means = _solved(products, np.asarray(weights, dtype=np.float64), settings)
    return gathered([means], means.coefficients[0])


def combined(group: Group, coefficients: Floats) -> torch.Tensor:
    """The output of a group, of the promoted dtype, from the coefficients of its mean."""
    dtypes = [tensor.dtype for tensor in (*group.tensors, group.base) if tensor is not None]
    # The mean of one is that one; the base would only round it.
    base = None if len(group.tensors) == 1 and bool((coefficients == 1).all()) else group.base
    return combine(group.tensors, coefficients, reduce(torch.promote_types, dtypes), base=base)


def needs_exact(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether their Gram matrix must be exact at once.

    On an accelerator a second look, at wide angles, would be a second synchronisation.
    """
    return tensors[0].device.type != "cpu" or any(t.dtype == torch.float64 for t in tensors)


def check_stopping(max_iter: int, tol: float) -> None:
    """Raise unless max_iter is a whole number >= 1 and tol is finite and positive."""
    if not (max_iter >= 1 and max_iter % 1 == 0):
        raise KarcherError(f"max_iter is {max_iter}: give a whole number of 1 or more.")
    if not 0 < tol < math.inf:
        raise KarcherError(f"tol is {tol}: give a positive, finite angle in radians, such as 1e-9.")


def check_weights(weights: Sequence[float], labels: Sequence[str], name: str) -> None:
    """Raise unless there is one weight per input, all finite and >= 0, not all zero."""
    if len(weights) != len(labels):
        raise KarcherError(
            f"{len(weights)} weights were given for {len(labels)} inputs of {name}: "
            "give one weight for each input."
        )
    for weight, label in zip(weights, labels, strict=True):
        if not 0 <= weight < math.inf:
            raise KarcherError(
                f"The weight of {label} for {name} is {weight}: give a finite number of 0 or more."
            )
    if labels and not any(weights):
        raise KarcherError(
            f"All weights for {name} are zero ({', '.join(labels)}): "
            "give at least one input a positive weight."
        )


def _check_tensors(group: Group) -> None:
    tensors, labels, name = list(group.tensors), list(group.labels), group.name
    if not tensors:
        raise KarcherError(f"There is no input for {name}: give at least one tensor.")
    if group.base is not None:
        tensors.append(group.base)
        labels.append("the base")
    for tensor, label in zip(tensors, labels, strict=True):
        if tensor.dtype not in _DTYPES:
            raise KarcherError(
                f"{name} of {label} is {tensor.dtype}: a Karcher mean needs float16, bfloat16, "
                "float32 or float64; convert it, or copy it from one input instead."
            )
        if tensor.shape != tensors[0].shape:
            raise KarcherError(
                f"{name} of {label} has shape {tuple(tensor.shape)}, but {labels[0]} has "
                f"{tuple(tensors[0].shape)}: give tensors of one shape."
            )
        if tensor.device != tensors[0].device:
            raise KarcherError(
                f"{name} of {label} is on {tensor.device}, but {labels[0]} is on "
                f"{tensors[0].device}: move them to one device."
            )


def _not_finite(tensor: torch.Tensor, label: str, name: str) -> KarcherError:
    flat = tensor.detach().reshape(-1)
    bad = torch.nonzero(~torch.isfinite(flat)).reshape(-1)
    index = int(bad[0])
    place = [int(i) for i in np.unravel_index(index, tensor.shape)]
    return KarcherError(
        f"{name} of {label} is not finite in {len(bad)} of {len(flat)} places, first {flat[index]} "
        f"at {place}: repair or leave out that model, or give it a weight of 0."
    )


class _Job:
    """What one call of `merge` works on, but for the tensors, which autograd hands in and keeps."""

    def __init__(
        self,
        groups: Sequence[Group],
        weights: Floats,
        settings: Settings,
        watch: Watch | None,
    ) -> None:
        self.groups, self.weights, self.settings = list(groups), weights, settings
        self.watch = watch
        self.solved: list[SphereMeans] = []
        self.coefficients: Floats = np.empty((0, 0))
        self.counted = [*_counted(groups)]

    def tensors(self) -> list[torch.Tensor]:
        """Those of all groups in a row, their bases last."""
        bases = [group.base for group in self.groups if group.base is not None]
        return [tensor for group in self.groups for tensor in group.tensors] + bases

    def by_row(self, group: Group) -> bool:
        """Whether each row of the group is a vector of its own."""
        first = group.tensors[0]
        return self.settings.granularity == "row" and first.ndim > 1 and first.numel() > 0

    def blocks(self, group: Group) -> Iterator[tuple[slice, Group]]:
        """Parts of a group that are solved at once: blocks of rows, or all of it."""
        if not self.by_row(group):
            yield slice(0, 1), group
            return
        rows = group.tensors[0].shape[0]
        step = max(1, _ROW_ELEMENTS // (len(group.tensors) + 1) ** 2)
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            base = None if group.base is None else group.base[here]
            metric = None if group.metric is None else group.metric.rows(here)
            tensors = [t[here] for t in group.tensors]
            yield here, group._replace(tensors=tensors, base=base, metric=metric)

    def mean(self) -> KarcherMean:
        """The mean, for all blocks together."""
        self.solved = [*self._means()]
        by_row = self.by_row(self.groups[0])
        return gathered(self.solved, self.coefficients if by_row else self.coefficients[0])

    def _products(self, group: Group, *, by_row: bool, exact: bool) -> Products:
        watched = self.watch is not None
        return products_of(group, with_base=watched, by_row=by_row, exact=exact)

    def _means(self) -> Iterator[SphereMeans]:
        """The means, block after block."""
        count = len(self.weights)
        if self.settings.granularity == "model":
            parts = []
            for group, counts in zip(self.groups, self.counted, strict=True):
                if counts:
                    exact = needs_exact(group.tensors)
                    products = self._products(group, by_row=False, exact=exact)
                    parts.append(products.first(count))
                    if self.watch is not None:
                        self.watch(group, products)
            means = _solved(total(parts), self.weights, self.settings)
            self.coefficients = means.coefficients
            yield means
            return
        (group,) = self.groups
        exact = needs_exact(group.tensors)
        # One array for the coefficients of all rows: with many of them, two would be felt.
        rows = group.tensors[0].shape[0] if self.by_row(group) else 1
        self.coefficients = np.empty((rows, len(group.tensors)))
        seen = []
        for here, block in self.blocks(group):
            products = self._products(block, by_row=self.by_row(group), exact=exact)
            means = _solved(products.first(count), self.weights, self.settings)
            single = any(tensor.dtype == torch.float32 for tensor in block.tensors)
            if single and not exact and np.any(means.angles > _WIDE_ANGLE):
                products = self._products(block, by_row=self.by_row(group), exact=True)
                means = _solved(products.first(count), self.weights, self.settings)
            if self.watch is not None:
                seen.append(products.over_rows())
            own = self.coefficients[here]
            own[:] = means.coefficients
            # The largest of the rows is all that is told of their angles.
            angles = np.fmax.reduce(means.angles, axis=0, keepdims=True)
            yield replace(means, angles=angles, coefficients=own)
        if self.watch is not None:
            self.watch(group, total(seen))

    def pulled_back(self, products: Products, block: int) -> Floats:
        """What `vjp` says of a block, for each input (R, N, N + 1) over the inputs and v."""
        means = self.solved[block]
        magnitude = self.settings.magnitude
        ahead, among = vjp(products.grams, self.weights, products.exponents, means, magnitude)
        return np.concatenate([among, ahead[:, :, None]], axis=-1)


def _counted(groups: Sequence[Group]) -> Iterator[bool]:
    """Whether each group counts: tied weights, one memory in every input, do so once."""
    seen = set()
    for group in groups:
        place = tuple((t.data_ptr(), t.shape, t.stride()) for t in group.tensors)
        yield place not in seen or group.tensors[0].numel() == 0
        seen.add(place)


def _solved(products: Products, weights: Floats, settings: Settings) -> SphereMeans:
    return solve_means(
        products.grams,
        weights,
        products.exponents,
        magnitude=settings.magnitude,
        max_iter=settings.max_iter,
        tol=settings.tol,
    )


class _Merge(torch.autograd.Function):
    """The three passes, with a backward pass in the same three."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: torch.Tensor) -> tuple[Any, ...]:
        # Kept for the check that nobody changed them before the backward pass.
        ctx.save_for_backward(*tensors)
        ctx.job = job
        mean = job.mean()
        outputs = [combined(group, mean.coefficients) for group in job.groups]
        return (*outputs, mean)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        job = ctx.job
        assert ctx.saved_tensors
        groups = [
            _with_upstream(group, gradient)
            for group, gradient in zip(job.groups, upstream[:-1], strict=True)
        ]
        if job.settings.granularity == "model":
            counted = zip(groups, job.counted, strict=True)
            found = [job.pulled_back(total([products_of(g) for g, counts in counted if counts]), 0)]
        else:
            found = [
                job.pulled_back(products_of(block, by_row=job.by_row(groups[0])), index)
                for index, (_, block) in enumerate(job.blocks(groups[0]))
            ]
        among = np.concatenate(found)
        needed = iter(ctx.needs_input_grad[1:])
        gradients = [
            _gradient(group, among[:, index] if by_row else among[0, index], tensor.dtype)
            if next(needed)
            else None
            for group, own in zip(groups, job.groups, strict=True)
            for by_row in [job.by_row(own)]
            for index, tensor in enumerate(own.tensors)
        ]
        for group, own in zip(groups, job.groups, strict=True):
            if own.base is not None:
                # What moves the base moves all differences the other way.
                rest = -among.sum(1)
                rest[:, -1] += 1
                rest = rest if job.by_row(own) else rest[0]
                wanted = next(needed)
                gradients.append(_gradient(group, rest, own.base.dtype) if wanted else None)
        return (None, *gradients)


def _with_upstream(group: Group, gradient: torch.Tensor) -> Group:
    """The inputs as seen from the base, with the upstream gradient v as one more.

    In a metric that is G^-1 v, whose inner products with the inputs are those of v without one, to
    within a factor of G that `_gradient` takes back.
    """
    tensors = group.tensors
    if group.base is not None:
        tensors = [tensor.double() - group.base.double() for tensor in tensors]
    if group.metric is not None:
        gradient = gradient.double() / group.metric.dense(gradient)
    labels = [*group.labels, "the upstream gradient"]
    return Group(group.name, [*tensors, gradient], labels, metric=group.metric)


def _gradient(group: Group, coefficients: Floats, dtype: torch.dtype) -> torch.Tensor:
    """What `vjp` says of one input, from its coefficients over such a group."""
    if group.metric is None:
        return combine(group.tensors, coefficients, dtype)
    found = combine(group.tensors, coefficients, torch.float64)
    return found.mul_(group.metric.dense(found)).to(dtype)
