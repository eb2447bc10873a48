"""The mean of linear layers, each in the metric of its own inputs: one linear solve a layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.means.finite import check_result
from mergekit_karcher.means.input_gram import InputGram
from mergekit_karcher.means.inputs import Inputs

_LOG = logging.getLogger(__name__)

# Of the mean eigenvalue of the summed metrics.
RIDGE = 0.3

# Changes that take a smaller part than this of the directions that they could take are of low rank,
# as those of LoRA are. Per layer, SmolLM2's fine-tunes of rank 8 take 0.1 to 1.2 %, those of all
# weights 1 to 25 %, and networks that are smaller take more.
_LOW_RANK = 0.015


class MatrixMean(NamedTuple):
    """A mean in matrix metrics.

    tensor: The mean. unsolved: Of how many of its layers it is the linear mean. low_rank: In how
    many the changes are of low rank.
    """

    tensor: torch.Tensor
    unsolved: int
    low_rank: int


def check_ridge(ridge: float) -> None:
    """Raise `KarcherError` unless ridge is a finite fraction of 0 or more."""
    if not 0 <= ridge < math.inf:
        raise KarcherError(f"ridge is {ridge}: give a finite fraction of 0 or more, such as 0.3.")


def warn_of_unsolved(name: str) -> None:
    """Say that a tensor could not be solved."""
    _LOG.warning("%s cannot be solved: it is the weighted linear mean. A larger ridge helps.", name)


@torch.no_grad()
def matrix_mean(inputs: Inputs, ridge: float, saved_as: torch.dtype | None = None) -> MatrixMean:
    """The mean W of layers W_k in metrics A_k, drawn to their weighted linear mean M.

    It minimises J(W) = sum_k w_k tr((W - W_k) A_k (W - W_k)') + r g |W - M|^2, with g the mean
    diagonal of S = sum_k w_k A_k, which is its mean eigenvalue:

        W = M + (sum_k w_k (W_k - M) A_k) (S + r g I)^-1

    A model whose A_k is zero has no weight in that layer.

    S takes about d = tr(S)^2 / tr(S^2) directions. Changes of low rank, as adapters make, take few
    of those that their shape allows. Most eigenvalues are zero then, and their mean is so small
    that the answer would trust directions of which the changes say next to nothing. So from the
    weights alone, g is the mean over those d there, tr(S) / d.

    Arguments:
        inputs: Checked; (out, in), or (experts, out, in), each of which is a layer. Of more axes,
            which convolutions have, all but the first are one. Without grams the A_k are those of
            the changes from the base, t_k = W_k - base: A_k = t_k' t_k / |t_k|^2. Each gradient
            step of a linear layer is a sum of outer products with its inputs, so the rows of t_k
            span what training saw.
        ridge: r.
        saved_as: What the result is cast to in the end; by default its own dtype.

    Returns:
        A new tensor of the dtype that all inputs promote to; layers that cannot be solved are the
        linear mean. The work is done in float64; one A_k is held at a time, beside two of its size.

    Raises:
        KarcherError: If the result is not finite.
    """
    check_ridge(ridge)
    first = inputs.tensors[0]
    result = torch.empty(first.shape, dtype=inputs.dtype, device=first.device)
    unsolved = low_rank = 0
    of_changes = inputs.grams is None
    for index, target in enumerate(_layers(result)):
        layers = [_layers(tensor)[index] for tensor in inputs.tensors]
        metrics = _metrics(inputs, layers, index)
        mean = _mean_of_layer(layers, metrics, inputs.weights.tolist(), ridge, of_changes)
        target.copy_(mean.tensor)
        unsolved += mean.unsolved
        low_rank += mean.low_rank
    check_result(result, inputs, saved_as or result.dtype)
    return MatrixMean(result, unsolved, low_rank)


def _layers(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """The layers of a stack, or the one that a tensor is, as (out, in); views if possible."""
    return tensor.unbind() if tensor.ndim == 3 else [tensor.flatten(1)]


class _Metric(NamedTuple):
    """A metric that is not zero, made when it is needed.

    rank: how many rows its factor has; None if it is not a factor alone.
    """

    make: Callable[[], InputGram]
    rank: int | None


def _metrics(
    inputs: Inputs, layers: Sequence[torch.Tensor], index: int
) -> Sequence[_Metric | None]:
    """Those of the inputs for the layer at an index of a stack; None for one that is zero."""
    if inputs.grams is not None:
        stacked = inputs.tensors[0].ndim == 3
        return [_given(gram.expert(index) if stacked else gram) for gram in inputs.grams]
    if inputs.base is None:
        raise KarcherError(f"{inputs.name} has neither metrics nor a base: give one of them.")
    base = _layers(inputs.base)[index]
    return [_of_change(layer, base) for layer in layers]


def _given(gram: InputGram) -> _Metric | None:
    factor = gram.factor if gram.diagonal is None else None
    rank = None if factor is None else len(factor)
    return _Metric(lambda: gram, rank) if gram.trace() > 0 else None


def _of_change(layer: torch.Tensor, base: torch.Tensor) -> _Metric | None:
    """The metric of a layer by its change from the base."""

    def change() -> torch.Tensor:
        return layer.double() - base.double()

    length = float(change().norm())
    outputs, inputs = layer.shape

    def metric() -> InputGram:
        unit = change().div_(length)
        return InputGram(factor=unit) if outputs < inputs else InputGram(dense=unit.T @ unit)

    return None if length == 0 else _Metric(metric, outputs if outputs < inputs else None)


def _mean_of_layer(
    layers: Sequence[torch.Tensor],
    metrics: Sequence[_Metric | None],
    weights: Sequence[float],
    ridge: float,
    of_changes: bool,
) -> MatrixMean:
    """`matrix_mean` of one layer, in float64."""
    entries = [*zip(layers, metrics, weights, strict=True)]
    given = [(layer, metric, weight) for layer, metric, weight in entries if metric is not None]
    sure = [(layer, weight) for layer, _, weight in given or entries]
    total = sum(weight for _, weight in sure)
    outputs, inputs = layers[0].shape
    mean = layers[0].new_zeros(outputs, inputs, dtype=torch.float64)
    for layer, weight in sure:
        mean.add_(layer.double(), alpha=weight / total)
    if len(given) < 2:
        return MatrixMean(sure[0][0] if given else mean, unsolved=0, low_rank=0)
    terms = [(layer, metric, weight / total) for layer, metric, weight in given]
    ranks = [metric.rank for _, metric, _ in given if metric.rank is not None]
    few = ridge > 0 and len(ranks) == len(given) and sum(ranks) < inputs
    possible = min(inputs, outputs * len(given))
    least = _LOW_RANK * possible if of_changes else 0.0
    correction, low_rank = (_by_factors if few else _by_sum)(mean, terms, ridge, least)
    if correction is None:
        return MatrixMean(mean, unsolved=1, low_rank=0)
    return MatrixMean(mean.add_(correction), unsolved=0, low_rank=low_rank)


_Terms = Sequence[tuple[torch.Tensor, _Metric, float]]


def _by_sum(
    mean: torch.Tensor, terms: _Terms, ridge: float, least: float
) -> tuple[torch.Tensor | None, bool]:
    """(sum_k w_k (W_k - M) A_k) (S + r g I)^-1, as it is written, and whether it is of low rank.

    least: how many directions it takes at least if it is not.
    """
    inputs = mean.shape[1]
    summed = mean.new_zeros(inputs, inputs)
    pull = torch.zeros_like(mean)
    for layer, metric, weight in terms:
        gram = metric.make()
        gram.add_to(summed, weight)
        pull.add_(gram.applied_to(layer.double() - mean), alpha=weight)
    level, low_rank = _mean_eigenvalue(summed, inputs, least)
    return _solved(pull, summed, ridge * level), low_rank


def _by_factors(
    mean: torch.Tensor, terms: _Terms, ridge: float, least: float
) -> tuple[torch.Tensor | None, bool]:
    """The same of A_k = F_k' F_k that have fewer rows together than the layer has inputs.

    With S = R' R, R the rows sqrt(w_k) F_k of all models, and P the columns sqrt(w_k) (W_k - M)
    F_k', it is P R (R' R + c I)^-1 = P (R R' + c I)^-1 R: a smaller system, with the eigenvalues of
    S but for zeros.
    """
    outputs, inputs = mean.shape
    ranks = [metric.rank or 0 for _, metric, _ in terms]
    rows = mean.new_empty(sum(ranks), inputs)
    pull = mean.new_empty(outputs, sum(ranks))
    for (layer, metric, weight), part, columns in zip(
        terms, torch.split(rows, ranks), torch.split(pull, ranks, 1), strict=True
    ):
        part.copy_(metric.make().matrix).mul_(math.sqrt(weight))
        columns.copy_((layer.double() - mean) @ part.T)
    summed = rows @ rows.T
    level, low_rank = _mean_eigenvalue(summed, inputs, least)
    solved = _solved(pull, summed, ridge * level)
    return None if solved is None else solved @ rows, low_rank


def _mean_eigenvalue(summed: torch.Tensor, inputs: int, least: float) -> tuple[float, bool]:
    """That of S, or over the directions that it takes if they are fewer than least; and which."""
    trace = float(summed.trace())
    # Given Grams, for which least is 0, may be too small or too large to square.
    if least > 0 and (taken := (trace / float(summed.norm())) ** 2) < least:
        return trace / taken, True
    return trace / inputs, False


def _solved(pull: torch.Tensor, summed: torch.Tensor, level: float) -> torch.Tensor | None:
    """pull (summed + level I)^-1, or None if that cannot be told; summed is changed."""
    summed.diagonal().add_(level)
    lower, failed = torch.linalg.cholesky_ex(summed)
    pivots = lower.diagonal().square()
    least = len(summed) * torch.finfo(torch.float64).eps * pivots.max()
    if int(failed) or not bool(pivots.min() > least):
        return None
    return torch.cholesky_solve(pull.T, lower).T
