"""`mergekit-karcher fisher`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_karcher.cli.main import examples, logged
from mergekit_karcher.metrics.activation_run import ActivationSummary, metric_from_activations
from mergekit_karcher.metrics.examples import Source
from mergekit_karcher.metrics.run import Summary, metric_from_data, metric_from_optimizer


@click.command(
    "fisher",
    epilog=examples(
        "mergekit-karcher fisher ./expert --data train.jsonl --out expert-fisher",
        "mergekit-karcher fisher org/model --data text.txt --true --out model-fisher",
        "mergekit-karcher fisher org/classifier --data nyu-mll/glue --subset mnli \\",
        "    --text premise --text hypothesis --out mnli-fisher",
        "mergekit-karcher fisher ./expert --kind activations --data train.txt --out expert-inputs",
        "mergekit-karcher fisher --from-optimizer run/checkpoint-500 --model run/checkpoint-500 \\",
        "    --out run-metric",
    ),
)
@click.argument("model", required=False)
@click.option("--model", "named", metavar="MODEL", help="The model, as an option.")
@click.option(
    "--data",
    help="What the model was trained on: a text, a file of records (.jsonl, .json, .csv, "
    ".parquet), or a dataset.",
)
@click.option(
    "--kind",
    type=click.Choice(["diagonal", "activations"]),
    default="diagonal",
    show_default=True,
    help="From --data: the diagonal of the Fisher information, by gradients; or the second moments "
    "of what each weight is multiplied with, by forward passes alone.",
)
@click.option(
    "--from-optimizer",
    "optimizer",
    type=click.Path(exists=True, path_type=Path),
    metavar="CHECKPOINT",
    help="Take sqrt(v) of Adam's state instead: from a checkpoint of the Trainer, or from one of "
    "torch.distributed that names its parameters.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Where the metric goes. The same command again goes on with an interrupted run.",
)
@click.option(
    "--true", "sampled", is_flag=True, help="Draw the targets from the model, not from the data."
)
@click.option(
    "--examples",
    "most",
    type=click.IntRange(1),
    help="Examples at most, drawn at random.  [default: 1000; of activations 128]",
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
    help="Examples at a time: more is quicker for small models, and takes more memory.  [default: "
    "1; of activations as many as have 2048 tokens]",
)
@click.option("--subset", help="The configuration of a dataset.")
@click.option("--split", default="train", show_default=True, help="The split of a dataset.")
@click.option(
    "--text",
    multiple=True,
    default=["text"],
    show_default=True,
    help="The column of a text or conversation; give it twice for pairs.",
)
@click.option("--label", default="label", show_default=True, help="The column of a class.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--device", help="Where to compute.  [default: cuda if there is one, else cpu]")
@logged
def main(**options: Any) -> None:
    """Make a metric: how sure MODEL is of each of its parameters.

    From --data: the diagonal of its Fisher information, from the gradient of every single example.
    MODEL is a causal language model or a classifier, and is taken in float32. Memory is 12 bytes a
    parameter, 4 more for each example of a batch, and the activations.

    With --kind activations: the mean of x x' over all inputs x of each linear layer. One block of
    MODEL is in memory at a time.

    From --from-optimizer: what Adam kept while it trained MODEL.
    """
    models = [model for model in (options["model"], options["named"]) if model]
    if len(models) != 1:
        raise click.UsageError("Give one model, as the argument or by --model.")
    if (options["data"] is None) == (options["optimizer"] is None):
        raise click.UsageError("Give either --data or --from-optimizer.")
    if options["kind"] == "activations" and (options["optimizer"] or options["sampled"]):
        raise click.UsageError("--kind activations takes --data, and neither optimizer nor --true.")
    if len(options["text"]) > 2:
        raise click.UsageError("Give one --text, or two for pairs.")
    out, quiet = options["out"], options["quiet"]
    if quiet:
        from transformers.utils import logging

        # transformers shows progress bars wherever it loads a model.
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = Source(**{name: options[name] for name in Source._fields})
    if options["kind"] == "activations":
        source = source._replace(most=source.most or 128)
        how = {name: options[name] for name in ("batch_size", "device", "quiet")}
        said = _of_activations(metric_from_activations(models[0], out, source, **how))
    elif options["optimizer"] is not None:
        said = _of_diagonal(metric_from_optimizer(models[0], out, options["optimizer"]))
    else:
        source = source._replace(most=source.most or 1000)
        how = {name: options[name] for name in ("sampled", "device", "quiet")}
        size = options["batch_size"] or 1
        said = _of_diagonal(metric_from_data(models[0], out, source, batch_size=size, **how))
    if not quiet:
        click.echo(
            f"{out}: {said}. In a config, under the parameters of the model: metric: {out}",
            err=True,
        )


def _of_diagonal(summary: Summary) -> str:
    return (
        f"the metric of {summary.parameters} parameters, {summary.mean:.3g} on average, "
        f"{100 * summary.zeros:.3g} % of it zero"
    )


def _of_activations(summary: ActivationSummary) -> str:
    unused = f", {summary.unused} more that no token reached" if summary.unused else ""
    return (
        f"{summary.grams} input Grams of {summary.layers} layers, from {summary.tokens} "
        f"tokens{unused}"
    )
