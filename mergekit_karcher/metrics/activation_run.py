"""From a model and data to the metrics of what its weights are multiplied with, in a folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.metrics import low_rank
from mergekit_karcher.metrics.activation_store import Folder, as_stored, check_new, is_unfinished
from mergekit_karcher.metrics.activations import ActivationSums
from mergekit_karcher.metrics.blocks import Blocks, find_blocks
from mergekit_karcher.metrics.examples import Example, Source, batches, digest, read_examples
from mergekit_karcher.metrics.model import classes_of, fingerprint_of, fitting, tokenizer_of
from mergekit_karcher.metrics.skeleton import Skeleton

_LOG = logging.getLogger(__name__)

# Tokens of a batch, unless the caller says how many examples it has: fewer make slow products.
_TOKENS = 2048


class ActivationSummary(NamedTuple):
    """A metric in four numbers."""

    layers: int  # weights with an input Gram
    grams: int  # input Grams, each shared by the weights that have the same inputs
    tokens: int
    unused: int  # weights of layers that no token reached


class _Part(NamedTuple):
    """What of a network is run together: a block, what is around the blocks, or all of it.

    parameters: the names of its weights. module: where they are. run: a forward pass through it
    for the batch of that index. loads: whether its weights are loaded for it, and freed after.
    """

    parameters: list[str]
    module: nn.Module
    run: Callable[[int], object]
    loads: bool


def metric_from_activations(
    reference: str,
    out: Path,
    source: Source,
    *,
    examples: Sequence[Example] | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> ActivationSummary:
    """Write the input Grams of a model's linear layers, and diagonal metrics of the rest.

    One block of the network is in memory at a time, beside its embeddings, the hidden states of all
    examples and the sums of the block. Where a network cannot be run block after block, all of it
    is, which is said.

    Arguments:
        reference: A causal language model or a classifier, a folder or a Hub id.
        out: A folder that is not there, or that holds an interrupted run with the same settings,
            which then goes on.
        source: The data.
        examples: Those of it to take, the shortest first; None to read and choose them here.
        batch_size: Examples at a time; by default so many that they have about 2048 tokens.
        device: Where to compute, as torch writes it; None: the GPU if there is one.
        quiet: Without progress bars.

    Returns:
        What the metric has.

    Raises:
        KarcherError: If the folder holds anything else, if the model or the data cannot be read or
            do not fit, if an input is not finite, or after Ctrl-C.
    """
    if not is_unfinished(out):
        check_new(out)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    skeleton = Skeleton(reference, where)
    if examples is None:
        source, examples = _read(reference, source, skeleton.model.config, quiet=quiet)
    size = batch_size or max(1, _TOKENS // len(examples[-1].ids))
    with torch.no_grad():
        run = _Run(skeleton, [batch.ids.to(where) for batch in batches(examples, size)], quiet)
        decisive = {
            **source._asdict(),
            "model": reference,
            "examples": digest(examples),
            "batch size": size,
            "dense width": low_rank.DENSE_WIDTH,
        }
        decisive["weights"] = run.fingerprint
        folder = Folder(out, len(run.parts), decisive)
        run.write(folder)
    about = {**source._asdict(), "examples": len(examples), "tokens": run.tokens}
    about |= {"digest": digest(examples), "block by block": run.is_by_block}
    known = skeleton.weights.stored - skeleton.copies
    contents = folder.finish(reference, known, about)
    grams = set(contents.grams.values())
    return ActivationSummary(len(contents.grams), len(grams), run.tokens, len(contents.unused))


def _read(
    reference: str, source: Source, config: Any, *, quiet: bool
) -> tuple[Source, Sequence[Example]]:
    """The examples of a source that a model can take, and the source as it was read."""
    tokenizer = tokenizer_of(reference)
    source = fitting(source, config, tokenizer)
    return source, read_examples(source, tokenizer, classes_of(reference), quiet=quiet)


class _Run:
    """The parts of a network one after the other, each over all batches of tokens."""

    def __init__(self, skeleton: Skeleton, ids: Sequence[Tensor], quiet: bool) -> None:
        self._skeleton, self._ids, self._quiet = skeleton, ids, quiet
        self.tokens = sum(batch.numel() for batch in ids)
        model: Any = skeleton.model
        names = [name for name, _ in model.named_parameters()]
        head = getattr(model.get_output_embeddings(), "weight", None)
        self._head = next((n for n in names if model.get_parameter(n) is head), None)
        table = getattr(model.get_input_embeddings(), "weight", None)
        # Nobody needs the scores of all tokens: only a head that is the embedding has weights.
        unloaded = {self._head} if head is not table else set()
        blocks = find_blocks(model)
        prefix = f"{blocks.name}." if blocks else ""
        outer = [n for n in names if not (prefix and n.startswith(prefix)) and n not in unloaded]
        skeleton.load(outer)
        self.fingerprint = fingerprint_of(map(model.get_parameter, outer))
        rest = [name for name in names if name not in outer and name not in unloaded]
        self.is_by_block = blocks is not None and self._trace(blocks)
        if blocks is not None and self.is_by_block:
            self.parts = self._parts_by_block(blocks, [*outer, *(n for n in unloaded if n)])
        else:
            _LOG.warning(
                "%s cannot be run block after block: all of it is in memory, and a run that is "
                "interrupted starts anew.",
                skeleton.reference,
            )
            skeleton.load(rest)
            whole = [name for name in names if name in {*outer, *rest, *unloaded}]

            def forward(index: int) -> object:
                return model(input_ids=ids[index])

            self.parts = [_Part(whole, model, forward, False)]

    def _trace(self, blocks: Blocks) -> bool:
        """Find what the blocks are called with; whether they can be run one after the other."""
        self._calls = []
        for ids in self._ids:
            calls = blocks.calls(ids)
            if calls is None:
                return False
            self._calls.append(calls)
        self._hidden = [calls.hidden for calls in self._calls]
        return True

    def _parts_by_block(self, blocks: Blocks, outer: list[str]) -> list[_Part]:
        def through(block: int) -> Callable[[int], object]:
            def run(index: int) -> None:
                calls, hidden = self._calls[index], self._hidden[index]
                self._hidden[index] = blocks.run(block, hidden, calls, self._skeleton.device)

            return run

        def around(index: int) -> None:
            blocks.run_rest(self._ids[index], self._hidden[index])

        parts = []
        for index in range(len(blocks)):
            prefix = f"{blocks.name}.{index}."
            names = [prefix + name for name, _ in blocks[index].named_parameters()]
            parts.append(_Part(names, blocks[index], through(index), True))
        return [*parts, _Part(outer, self._skeleton.model, around, False)]

    def write(self, folder: Folder) -> None:
        """Write the metric of each part that the folder does not have yet.

        Raises:
            KarcherError: If a part is of other weights, if an input is not finite, or at Ctrl-C.
        """
        finished, total = folder.finished, len(self.parts)
        steps = total * len(self._ids)
        try:
            with tqdm(total=steps, desc="Activations", unit="batch", disable=self._quiet) as bar:
                for index, part in enumerate(self.parts):
                    self._run_part(folder, index, part, index < finished, bar)
        except KeyboardInterrupt:
            raise KarcherError(
                f"Stopped after {folder.finished} of {total} parts of the model, which are kept in "
                f"{folder.path}: run the same command again to go on."
            ) from None

    def _run_part(self, folder: Folder, index: int, part: _Part, is_there: bool, bar: Any) -> None:
        """Run a part over all batches, for its metric or, if that is there, for its outputs."""
        skeleton = self._skeleton
        if part.loads:
            skeleton.load(part.parameters)
        parameters = {name: skeleton.model.get_parameter(name) for name in part.parameters}
        weights = fingerprint_of(p for p in parameters.values() if not p.is_meta)
        if is_there:
            folder.check_weights(index, weights)
        sums = ActivationSums(parameters, part.module.modules(), self._head)
        for batch in range(len(self._ids)):
            if is_there:
                part.run(batch)
            else:
                with sums.watching(len(self._ids[batch])):
                    part.run(batch)
            bar.update()
        if not is_there:
            tensors, contents = as_stored(sums.measured(self.tokens), skeleton)
            folder.write(index, tensors, contents, weights)
        if part.loads:
            skeleton.unload(part.parameters)
