"""The texts that merges are judged on: windows to choose by, and others to report by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.metrics.examples import Example, Source, digest, read_examples
from mergekit_karcher.metrics.model import tokenizer_of

# Fewer windows for each purpose say nothing of the noise.
_FEWEST = 2

# Tokens of each text, beyond the windows, that a metric may be made from.
SPARE_TOKENS = 8192

# A text is in no language of the tokenizer if more of its tokens than this are unknown.
_UNKNOWN = 0.1

# Windows of each text that all tokenizers must cut into the same tokens.
_ALIKE = 4


@dataclass(frozen=True)
class Windows:
    """Windows of one text, or records, for one purpose, the shortest first.

    examples: their tokens, and classes for a classifier. sizes: what the cost of each is divided
    by: the bytes of all tokens but the first, which a language model is given; 1 for a classifier.
    """

    examples: Sequence[Example]
    sizes: Sequence[int]


@dataclass(frozen=True)
class Text:
    """A text with a name, in windows of which each has one purpose.

    choosing: to choose a merge by. reporting: to report by. spare: for metrics.
    """

    name: str
    choosing: Windows
    reporting: Windows
    spare: Sequence[Example]

    @property
    def digest(self) -> str:
        """Tells its windows and their purposes from others."""
        parts = (self.choosing.examples, self.reporting.examples, self.spare)
        return hashlib.sha256(repr([self.name, *map(digest, parts)]).encode()).hexdigest()


def named_data(data: Sequence[str]) -> dict[str, str]:
    """Where each text comes from, by its name.

    data: NAME=PLACE, or a place alone, whose last part without ending is then the name. Raises
    KarcherError if there is none, or two have one name.
    """
    if not data:
        raise KarcherError("There is no text to judge by: give one or more by --data NAME=FILE.")
    named: dict[str, str] = {}
    for entry in data:
        name, equals, place = entry.partition("=")
        if not equals:
            name, place = Path(entry).stem, entry
        if not name or not place:
            raise KarcherError(f"--data {entry} lacks a name or a file: write NAME=FILE.")
        if name in named:
            raise KarcherError(
                f"Two texts are called {name}: name them apart, by --data NAME=FILE."
            )
        named[name] = place
    return named


def read_texts(
    named: Mapping[str, str],
    source: Source,
    count: int,
    tokenizer: Any,
    classes: Mapping[str, int] | None,
    *,
    quiet: bool,
) -> list[Text]:
    """Read texts and cut them into windows.

    Arguments:
        named: Where each comes from.
        source: How to read them; its data and most do not matter.
        count: Windows of each text to choose by, and as many others to report by; fewer where the
            text is short.
        tokenizer: That of the models.
        classes: The number of each class of a classifier, by name; None for a language model.
        quiet: Whether to show no progress.

    Raises:
        KarcherError: If one cannot be read, is too short, or is not in the tokenizer's language.
    """
    spare = max(1, SPARE_TOKENS // source.length)
    texts = []
    for name, data in named.items():
        one = source._replace(data=data, most=2 * count + spare)
        examples = read_examples(one, tokenizer, classes, quiet=quiet)
        _check_language(examples, tokenizer, name, data)
        texts.append(_divide(name, one, _distinct(examples, tokenizer, classes), count))
    return texts


def _divide(name: str, source: Source, sized: Sequence[tuple[Example, int]], count: int) -> Text:
    """Give each window its purpose: by turns, so that both purposes see all of the text."""
    if len(sized) < 2 * _FEWEST:
        raise KarcherError(
            f"{name} ({source.data}) is too short: it has {len(sized)} different windows of up to "
            f"{source.length} tokens, and at least {2 * _FEWEST} are needed; give more text, or a "
            "smaller --length."
        )
    order = np.random.default_rng(source.seed).permutation(len(sized)).tolist()
    used = sorted(order[: 2 * min(count, len(sized) // 2)])
    spare = [sized[place][0] for place in sorted(order[len(used) :])]
    choosing, reporting = (
        Windows(*zip(*(sized[place] for place in used[start::2]), strict=True)) for start in (0, 1)
    )
    return Text(name, choosing, reporting, spare)


def _distinct(
    examples: Iterable[Example], tokenizer: Any, classes: Mapping[str, int] | None
) -> list[tuple[Example, int]]:
    """Each example once, with its size; none that has nothing to predict."""
    once = {tuple(example.ids): example for example in examples}.values()
    if classes is not None:
        return [(example, 1) for example in once]
    sized = ((example, len(tokenizer.decode(example.ids[1:]).encode())) for example in once)
    return [(example, size) for example, size in sized if size]


def _check_language(examples: Sequence[Example], tokenizer: Any, name: str, data: str) -> None:
    ids = np.concatenate([example.ids for example in examples])
    unknown = getattr(tokenizer, "unk_token_id", None)
    share = 0.0 if unknown is None else float(np.mean(ids == unknown))
    if share > _UNKNOWN:
        raise KarcherError(
            f"{100 * share:.0f} % of the tokens of {name} ({data}) are unknown to the tokenizer: "
            "give a text in a language of the models."
        )


def check_tokenizers(places: Mapping[str, str], texts: Sequence[Text]) -> None:
    """Raise `KarcherError` unless all models cut the texts into the tokens that the first does.

    Their bits per byte could not be compared otherwise, and their embeddings not be merged.

    places: the folder of each model.
    """
    references = list(places)
    first = tokenizer_of(places[references[0]])
    samples = {
        text.name: [first.decode(example.ids) for example in text.choosing.examples[:_ALIKE]]
        for text in texts
    }
    for reference in references[1:]:
        other = tokenizer_of(places[reference])
        for name, sample in samples.items():
            if any(first(text).input_ids != other(text).input_ids for text in sample):
                raise KarcherError(
                    f"{reference} and {references[0]} have different tokenizers, which cut {name} "
                    "into other tokens: compare models of one tokenizer."
                )
