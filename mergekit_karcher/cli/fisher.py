"""`mergekit-karcher fisher`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from mergekit_karcher.cli.main import examples, logged
from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.metrics.adam import adam_metric
from mergekit_karcher.metrics.diagonal import DiagonalFisher
from mergekit_karcher.metrics.examples import Source, batches, digest, read_examples
from mergekit_karcher.metrics.store import (
    WRITING,
    check_names,
    load_model,
    write_metric,
)

# What is lost at most when a run is cut off.
_SECONDS_BETWEEN_SAVES = 120

# A parameter, the float64 sum of its squared gradients, and the gradients of a batch.
_BYTES, _BYTES_AN_EXAMPLE = 4 + 8, 4

_PARTIAL = "partial.safetensors"
_PARTIAL_WRITING = f"{_PARTIAL}.writing"
# What a run that was cut off may leave behind.
_UNFINISHED = (_PARTIAL, _PARTIAL_WRITING, WRITING)


@click.command(
    "fisher",
    epilog=examples(
        "mergekit-karcher fisher ./expert --data train.jsonl --out expert-fisher",
        "mergekit-karcher fisher org/model --data text.txt --true --out model-fisher",
        "mergekit-karcher fisher org/classifier --data nyu-mll/glue --subset mnli \\",
        "    --text premise --text hypothesis --out mnli-fisher",
        "mergekit-karcher fisher --from-optimizer run/checkpoint-500 --model run/checkpoint-500 \\",
        "    --out run-metric",
    ),
)
@click.argument("model", required=False)
@click.option("--model", "named", metavar="MODEL", help="The model, as an option.")
@click.option(
    "--data",
    help="A text, a file of records (.jsonl, .json, .csv, .parquet), or a dataset: what the model "
    "was trained on.",
)
@click.option(
    "--from-optimizer",
    "optimizer",
    type=click.Path(exists=True, path_type=Path),
    metavar="CHECKPOINT",
    help="Take sqrt(v) of Adam's state instead: a checkpoint of the Trainer, or of torch with "
    "names.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Where the metric goes. Run again, an interrupted run goes on.",
)
@click.option(
    "--true", "sampled", is_flag=True, help="Draw the targets from the model, not from the data."
)
@click.option(
    "--examples",
    "count",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Examples at most, drawn at random.",
)
@click.option(
    "--length",
    type=click.IntRange(2),
    default=512,
    show_default=True,
    help="Tokens of an example at most; a text is cut into windows of that many.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Examples at a time: more is quicker for small models, and takes more memory.",
)
@click.option("--subset", help="The configuration of a dataset.")
@click.option("--split", default="train", show_default=True, help="The split of a dataset.")
@click.option(
    "--text",
    multiple=True,
    default=["text"],
    show_default=True,
    help="The column of a text or conversation; twice for pairs.",
)
@click.option("--label", default="label", show_default=True, help="The column of a class.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--device", help="Where to compute.  [default: cuda if there is one, else cpu]")
@logged
def main(
    model: str | None,
    named: str | None,
    data: str | None,
    optimizer: Path | None,
    out: Path,
    sampled: bool,
    count: int,
    length: int,
    batch_size: int,
    subset: str | None,
    split: str,
    text: tuple[str, ...],
    label: str,
    seed: int,
    device: str | None,
    quiet: bool,
) -> None:
    """Make a metric: how sure MODEL is of each of its parameters.

    From --data: the diagonal of its Fisher information, by the gradient of every single example. A
    causal language model or a classifier, in float32; memory is 12 bytes a parameter, and 4 more
    for each example of a batch, and the activations. Or from what Adam kept while it trained.
    """
    reference = model or named
    if reference is None or (model and named):
        raise click.UsageError("Give one model, as the argument or by --model.")
    if (data is None) == (optimizer is None):
        raise click.UsageError("Give either --data or --from-optimizer.")
    if len(text) > 2:
        raise click.UsageError("Give one --text, or two for pairs.")
    if out.exists() and not _is_unfinished(out):
        raise KarcherError(f"{out} exists: name a new folder by --out.")
    if quiet:
        _hide_bars()
    if optimizer is not None:
        if (out / _PARTIAL).exists():
            raise KarcherError(f"{out} holds an unfinished run from data: name another folder.")
        own = load_model(reference, empty=True)
        about = {"kind": "Adam: sqrt(v_hat) + eps", "from": str(optimizer)}
        metric = adam_metric(optimizer, own)
    else:
        assert data is not None
        source = Source(data, subset, split, text, label, length, count, seed)
        own = load_model(reference)
        own.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        metric, about = _fisher(own, reference, source, sampled, batch_size, out, quiet)
    write_metric(out, reference, own, metric, about)
    (out / _PARTIAL).unlink(missing_ok=True)
    if not quiet:
        _say(out, metric)


def _is_unfinished(out: Path) -> bool:
    """Whether a folder holds nothing but what a run that was cut off has left."""
    names = {path.name for path in out.iterdir()} - {*_UNFINISHED}
    # What was written is moved out of that folder, file by file.
    return not names or ((out / WRITING).is_dir() and all(n.startswith("model") for n in names))


def _hide_bars() -> None:
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _fisher(
    model: nn.Module,
    reference: str,
    source: Source,
    sampled: bool,
    batch_size: int,
    out: Path,
    quiet: bool,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from transformers import AutoTokenizer

    classes = _classes(model, reference)
    check_names(reference, model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(reference)
    except Exception as error:
        raise KarcherError(f"{reference} has no tokenizer ({first_line(error)}).") from None
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None) or source.length
    length = min(source.length, positions, tokenizer.model_max_length)
    source = source._replace(length=length)
    found = read_examples(source, tokenizer, classes)
    settings = {**source._asdict(), "model": reference, "true": sampled}
    # All that decides the sums, so that those of another run are not gone on with.
    state = {**settings, "examples": digest(found), "weights": _fingerprint(model)}
    fisher = DiagonalFisher(model)
    tokens = sum(len(example.ids) for example in found)
    if not quiet:
        count = sum(parameter.numel() for parameter in model.parameters())
        memory = (_BYTES + _BYTES_AN_EXAMPLE * batch_size) * count / 1e9
        click.echo(
            f"{len(found)} examples of {len(found[-1].ids)} tokens at most, {count:.3g} "
            f"parameters: {memory:.2g} GB of memory, and the activations.",
            err=True,
        )
    done = _resume(out, fisher, state)
    device = next(model.parameters()).device
    start = time.monotonic()
    bar = tqdm(total=len(found), initial=done, desc="Fisher", unit="example", disable=quiet)
    with bar, _asked_to_stop() as asked:
        # It goes on at the end of a batch, where every sum is of the same examples.
        for batch in batches(found[done:], batch_size):
            sampler = None
            if sampled:
                # By place, so that a run that goes on draws what it would have drawn.
                sampler = torch.Generator(device).manual_seed(source.seed + fisher.examples)
            fisher.add(batch, sampler)
            bar.update(len(batch.ids))
            if fisher.examples == len(batch.ids):
                fisher.check()
            if asked or time.monotonic() - start > _SECONDS_BETWEEN_SAVES:
                _save(out, fisher, state)
                start = time.monotonic()
            if asked:
                raise KarcherError(
                    f"Stopped after {fisher.examples} of {len(found)} examples, which are kept in "
                    f"{out}: run the same command again to go on."
                )
    _save(out, fisher, state)
    kind = "true" if sampled else "empirical"
    about = {
        "kind": f"diagonal {kind} Fisher information",
        **source._asdict(),
        "examples": len(found),
        "tokens": tokens,
    }
    return fisher.metric(), about


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Signals to stop that have come, which are left to the end of a batch; the second is not."""
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, _frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _classes(model: nn.Module, reference: str) -> dict[str, int] | None:
    """Those of a classifier, by name; None for a language model."""
    config: Any = model.config
    kind = type(model).__name__
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return None
    several = config.num_labels > 1 and config.problem_type in (
        None,
        "single_label_classification",
    )
    if kind.endswith("ForSequenceClassification") and several:
        return {str(name): int(index) for index, name in config.id2label.items()}
    raise KarcherError(
        f"{reference} is a {kind}: the Fisher information is made for causal language models and "
        "for classifiers of sequences into one of several classes."
    )


def _fingerprint(model: nn.Module) -> str:
    # Of their bits, because sums of numbers depend on the number of threads.
    sums = [
        int(own.detach().view(torch.int32).sum(dtype=torch.int64)) for own in model.parameters()
    ]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def _save(out: Path, fisher: DiagonalFisher, state: dict[str, Any]) -> None:
    fisher.check()
    metadata = {"state": json.dumps(state), "examples": str(fisher.examples)}
    out.mkdir(parents=True, exist_ok=True)
    writing = out / _PARTIAL_WRITING
    save_file(fisher.squares, writing, metadata)
    os.replace(writing, out / _PARTIAL)


def _resume(out: Path, fisher: DiagonalFisher, state: dict[str, Any]) -> int:
    """Go on with the sums of a run that was cut off; returns how many examples they are of."""
    path = out / _PARTIAL
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        before, now = json.loads(metadata["state"]), json.loads(json.dumps(state))
        other = [key for key in now if now[key] != before.get(key)]
        if other:
            raise KarcherError(
                f"{path} is of a run with other {', '.join(other)}: name a new folder by --out, or "
                "delete that file."
            )
        for name, squares in fisher.squares.items():
            squares.copy_(file.get_tensor(name))
    fisher.examples = int(metadata["examples"])
    return fisher.examples


def _say(out: Path, metric: dict[str, torch.Tensor]) -> None:
    total = sum(tensor.numel() for tensor in metric.values())
    zeros = sum(int((tensor == 0).sum()) for tensor in metric.values())
    mean = sum(float(tensor.sum(dtype=torch.float64)) for tensor in metric.values()) / total
    click.echo(
        f"{out}: the metric of {total} parameters, {mean:.3g} on average, {100 * zeros / total:.3g}"
        f" % of it zero. In a config, under the parameters of the model: metric: {out}",
        err=True,
    )
