"""The model that a metric is made of: loaded, told what it classifies, and told from others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.metrics.examples import Source


def class_of(reference: str) -> tuple[Any, Any]:
    """The config of a model and its class in transformers.

    Raises KarcherError if transformers cannot read the config, or does not have the class.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(reference)
    except Exception as error:
        raise KarcherError(
            f"{reference} is no model that transformers reads ({first_line(error)})."
        ) from None
    architecture = next(iter(config.architectures or ()), None)
    model_class = getattr(transformers, architecture or "", None)
    if model_class is None:
        raise KarcherError(
            f"The config of {reference} asks for {architecture}, which this transformers does not "
            "have: name a model of a class that it knows."
        )
    return config, model_class


def load_model(
    reference: str,
    *,
    empty: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: str | None = "eager",
) -> nn.Module:
    """Load a Hugging Face model, a folder or a Hub id, in evaluation mode on the CPU.

    An empty one has no weights, and its parameters are on the meta device. attention: how it is
    computed, as transformers calls it: in plain operations, which torch.func can take a batch at a
    time, or None for what is fastest. Raises KarcherError if
    the model cannot be loaded, if its weights have other shapes than its config says, or if some
    are missing and it is not to be empty.
    """
    _, model_class = class_of(reference)
    try:
        model, loading = model_class.from_pretrained(
            reference,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **({"device_map": "meta"} if empty else {}),
        )
    except Exception as error:
        raise KarcherError(f"{reference} cannot be loaded ({first_line(error)}).") from None
    mismatched = sorted(str(mismatch[0]) for mismatch in loading["mismatched_keys"])
    if mismatched:
        raise KarcherError(
            f"{mismatched[0]} of {reference} has not the shape that its config says: name a model "
            "whose config and weights belong together."
        )
    missing = sorted(loading["missing_keys"])
    if missing and not empty:
        raise KarcherError(
            f"{reference} lacks {missing[0]} of a {model_class.__name__}: it would be made up at "
            "random; name a model that has all of its weights."
        )
    evaluated: nn.Module = model.eval()
    return evaluated


def classes_of(reference: str) -> dict[str, int] | None:
    """The number of each class of a classifier, by name; None for a causal language model.

    Raises KarcherError if the model is neither, or does not choose one of several classes.
    """
    config, model_class = class_of(reference)
    kind = model_class.__name__
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return None
    one = config.num_labels > 1 and config.problem_type in (None, "single_label_classification")
    if kind.endswith("ForSequenceClassification") and one:
        return {str(name): int(index) for index, name in config.id2label.items()}
    raise KarcherError(
        f"{reference} is a {kind}, and neither a causal language model nor a classifier of "
        "sequences into one of several classes: name one of those."
    )


def tokenizer_of(reference: str) -> Any:
    """The tokenizer of a model; raises KarcherError if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(reference)
    except Exception as error:
        raise KarcherError(f"{reference} has no tokenizer ({first_line(error)}).") from None


def fitting(source: Source, config: Any, tokenizer: Any) -> Source:
    """A source whose examples are no longer than what a model and its tokenizer can take."""
    positions = getattr(config, "max_position_embeddings", None) or source.length
    return source._replace(length=min(source.length, positions, tokenizer.model_max_length))


def fingerprint(model: nn.Module) -> str:
    """A SHA-256, in hex, that tells the weights of a model in float32 from others."""
    return fingerprint_of(model.parameters())


def fingerprint_of(weights: Iterable[torch.Tensor]) -> str:
    """A SHA-256, in hex, that tells tensors in float32 from others.

    It is made of the sum of each one's bits, as integers: a sum of the numbers themselves would
    depend on the number of threads.
    """
    sums = [_sum_of_bits(weight.detach()) for weight in weights]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def _sum_of_bits(weight: torch.Tensor) -> int:
    if weight.is_contiguous() and weight.numel() % 2 == 0 and weight.storage_offset() % 2 == 0:
        # Two numbers at a time, without a cast; the sum may wrap around.
        return int(weight.view(-1).view(torch.int64).sum())
    return int(weight.view(torch.int32).sum(dtype=torch.int64))
