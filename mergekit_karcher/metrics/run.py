"""From a model, and data or an optimizer's state, to a metric in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import nn

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import PARTIAL, replacing
from mergekit_karcher.metrics.accumulate import SUMS_FILE, accumulate
from mergekit_karcher.metrics.adam import adam_metric
from mergekit_karcher.metrics.diagonal import DiagonalFisher
from mergekit_karcher.metrics.examples import Example, Source, digest, read_examples
from mergekit_karcher.metrics.model import (
    classes_of,
    fingerprint,
    fitting,
    load_model,
    tokenizer_of,
)
from mergekit_karcher.metrics.store import check_names, write_metric


class Summary(NamedTuple):
    """A metric in three numbers: its parameters, their mean, and the share of zeros."""

    parameters: int
    mean: float
    zeros: float


def metric_from_data(
    reference: str,
    out: Path,
    source: Source,
    *,
    sampled: bool,
    batch_size: int,
    device: str | None,
    quiet: bool,
) -> Summary:
    """Estimate the diagonal Fisher information of a model, a folder or a Hub id, and write it.

    sampled: draw the targets from the model (true Fisher). device: as torch writes it; None: the
    GPU if there is one. The folder `out` must not be there, or hold an interrupted run with the
    same settings, which then goes on. Raises KarcherError if it is no such run, if the model or the
    data cannot be read or do not fit, if a gradient is not finite, or after Ctrl-C.
    """
    if out.exists() and not _is_interrupted_run(out):
        raise KarcherError(f"{out} exists: name a new folder by --out.")
    model = load_model(reference)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    classes = classes_of(reference)
    check_names(reference, model)
    tokenizer = tokenizer_of(reference)
    source = fitting(source, model.config, tokenizer)
    examples = read_examples(source, tokenizer, classes, quiet=quiet)
    decisive = {
        **source._asdict(),
        "model": reference,
        "true": sampled,
        "examples": digest(examples),
        "weights": fingerprint(model),
    }
    if not quiet:
        _say_memory(model, examples, batch_size)
    fisher, seed = DiagonalFisher(model), source.seed if sampled else None
    accumulate(fisher, examples, out, decisive, batch_size=batch_size, seed=seed, quiet=quiet)
    about = {
        "kind": f"diagonal {'true' if sampled else 'empirical'} Fisher information",
        **source._asdict(),
        "examples": len(examples),
        "tokens": sum(len(example.ids) for example in examples),
    }
    metric = fisher.metric()
    write_metric(out, reference, model, metric, about)
    (out / SUMS_FILE).unlink()
    return _summary(metric)


def metric_from_optimizer(reference: str, out: Path, checkpoint: Path) -> Summary:
    """Write the metric that Adam has kept while it trained a model, whole or not at all.

    Raises KarcherError if the folder `out` is not empty, or if the model or the checkpoint (see
    `adam_metric`) cannot be read or do not fit each other.
    """
    if (out / SUMS_FILE).exists():
        raise KarcherError(f"{out} holds an unfinished run from data: name another folder.")
    if out.exists() and any(out.iterdir()):
        raise KarcherError(f"{out} exists: name a new folder by --out.")
    model = load_model(reference, empty=True)
    metric = adam_metric(checkpoint, model)
    about = {"kind": "Adam: sqrt(v_hat) + eps", "from": str(checkpoint)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        write_metric(partial, reference, model, metric, about)
    return _summary(metric)


def _is_interrupted_run(folder: Path) -> bool:
    """Whether a folder holds nothing but what a run from data leaves when it is cut off."""
    names = {path.name for path in folder.iterdir() if not path.name.endswith(PARTIAL)}
    # Beside its sums, a run that is being written has some of the files of the metric.
    with_sums = SUMS_FILE in names and all(n.startswith("model") for n in names - {SUMS_FILE})
    return not names or with_sums


def _say_memory(model: nn.Module, examples: list[Example], batch_size: int) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # The weights in 4 bytes, the sums in 8, and each example's gradient in 4.
    memory = (4 + 8 + 4 * batch_size) * parameters / 1e9
    click.echo(
        f"{len(examples)} examples of {len(examples[-1].ids)} tokens at most, {parameters:.3g} "
        f"parameters: {memory:.2g} GB of memory, and the activations.",
        err=True,
    )


def _summary(metric: dict[str, torch.Tensor]) -> Summary:
    parameters = sum(tensor.numel() for tensor in metric.values())
    total = sum(float(tensor.sum(dtype=torch.float64)) for tensor in metric.values())
    zeros = sum(int((tensor == 0).sum()) for tensor in metric.values())
    return Summary(parameters, total / parameters, zeros / parameters)
