"""Merges of an embedding that is the head as well, in each of its two metrics and in both.

As the embedding, a row matters as often as its token occurs; as the head, a column as much as the
final hidden states have of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from problem import State

from mergekit_karcher import InputGram, fisher_mean

HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"

# Of the embeddings of all experts, (tokens, width), how often each expert saw each token, and the
# second moments of its final hidden states.
Merge = Callable[
    [Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor
]


def is_tied(base: State, grams: State) -> bool:
    """Whether the head is the embedding, and its inputs are known."""
    return HEAD in grams and HEAD not in base


def embedding(
    states: Sequence[State], grams: Sequence[State], tokens: Sequence[torch.Tensor], merge: Merge
) -> State:
    """The merged embedding, by its name."""
    tensors = [state[_EMBEDDING] for state in states]
    counts = [
        torch.bincount(seen.flatten(), minlength=len(tensors[0])).double() / seen.numel()
        for seen in tokens
    ]
    return {_EMBEDDING: merge(tensors, counts, [gram[HEAD] for gram in grams])}


def _by_rows(
    tensors: Sequence[torch.Tensor],
    counts: Sequence[torch.Tensor],
    _grams: Sequence[torch.Tensor],
) -> torch.Tensor:
    metrics = [count[:, None].expand_as(tensors[0]).contiguous() for count in counts]
    return fisher_mean(tensors, metrics)


def _by_columns(
    tensors: Sequence[torch.Tensor],
    _counts: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor],
) -> torch.Tensor:
    return fisher_mean(tensors, [InputGram(dense=gram) for gram in grams], ridge=0.1)


def _by_both(
    tensors: Sequence[torch.Tensor],
    counts: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The minimum of the sum of both objectives, scaled to the same trace.

    The row of token v is W_v = (sum_k W_kv (c_kv I + A_k)) (sum_k c_kv I + A_k)^-1, and all rows
    share the eigenvectors of sum_k A_k.
    """
    rows, width = tensors[0].shape
    trace = sum(float(gram.trace()) for gram in grams)
    weight = trace / width * rows / sum(float(count.sum()) for count in counts)
    right = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, count, gram in zip(tensors, counts, grams, strict=True):
        right += tensor.double() @ gram.double() + weight * count[:, None] * tensor
    values, vectors = torch.linalg.eigh(torch.stack([*grams]).double().sum(0))
    row = weight * torch.stack([*counts]).sum(0)
    # A token that nobody saw has the metric of the head alone, as singular as that is.
    least = 1e-6 * trace / width
    return ((right @ vectors) / (row[:, None] + values + least) @ vectors.T).to(tensors[0].dtype)


MERGES: Mapping[str, Merge] = {
    "token counts": _by_rows,
    "hidden states": _by_columns,
    "both": _by_both,
}
