"""Examples for the Fisher information: from a file or a dataset to batches of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.metrics.diagonal import Batch

_RECORDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class Example(NamedTuple):
    """ids: the tokens of one example. label: its class, for a classifier."""

    ids: list[int]
    label: int | None


class Source(NamedTuple):
    """Where examples come from.

    data: a file of records (.jsonl, .json, .csv, .parquet); any other file, which is a text and is
        cut into windows of length tokens; or a dataset, in a folder or on the Hub.
    subset, split: which configuration and which part of a dataset.
    text: the columns of a record that hold its text, one or a pair. A conversation (a list of
        messages) goes through the tokenizer's chat template. label: the column of its class.
    length: tokens of an example at most. most: examples at most, drawn at random with seed.
    """

    data: str
    subset: str | None
    split: str
    text: Sequence[str]
    label: str
    length: int
    most: int
    seed: int


def read_examples(
    source: Source, tokenizer: Any, classes: Mapping[str, int] | None, *, quiet: bool = False
) -> list[Example]:
    """Read, choose and tokenize the examples of a source, the shortest first.

    classes: the number of each class of a classifier, by name; None for a language model. Records
    without text are left out. Raises KarcherError if the source cannot be read, has no such column
    or class, or holds no example, or if it needs the package datasets and that is missing.
    """
    path = Path(source.data)
    if path.suffix in (".txt", ".md", *_RECORDS) and not path.is_file():
        raise KarcherError(f"There is no file {path}.")
    if path.is_file() and path.suffix not in _RECORDS:
        if classes is not None:
            raise KarcherError(
                f"{path} is a plain text, which has no classes: give records (.jsonl, .csv, "
                f".parquet) with the columns {', '.join(source.text)} and {source.label}."
            )
        examples = _windows(source, tokenizer)
    else:
        examples = _records(source, tokenizer, classes, quiet)
    if not examples:
        raise KarcherError(f"{source.data} holds no example: each needs at least two tokens.")
    return sorted(examples, key=lambda example: len(example.ids))


def batches(examples: Sequence[Example], size: int) -> Iterator[Batch]:
    """Put examples, sorted by length, into batches of one length, so that none needs padding.

    They keep their order, in new tensors on the CPU.
    """
    start = 0
    while start < len(examples):
        length = len(examples[start].ids)
        alike = [e for e in examples[start : start + size] if len(e.ids) == length]
        ids = torch.tensor([example.ids for example in alike])
        labels = [example.label for example in alike if example.label is not None]
        yield Batch(ids, torch.tensor(labels) if labels else None)
        start += len(alike)


def digest(examples: Sequence[Example]) -> str:
    """The SHA-256 of all tokens and classes, in hex."""
    return hashlib.sha256(repr([tuple(example) for example in examples]).encode()).hexdigest()


def _chosen(source: Source, total: int) -> list[int]:
    order = np.random.default_rng(source.seed).permutation(total)
    return sorted(order[: source.most].tolist())


def _windows(source: Source, tokenizer: Any) -> list[Example]:
    try:
        text = Path(source.data).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise KarcherError(f"{source.data} is no text in UTF-8 ({error}).") from None
    ids = tokenizer(text, verbose=False).input_ids
    length = min(source.length, len(ids))
    if length < 2:
        return []
    places = (index * length for index in _chosen(source, len(ids) // length))
    return [Example(ids[place : place + length], None) for place in places]


def _records(
    source: Source, tokenizer: Any, classes: Mapping[str, int] | None, quiet: bool
) -> list[Example]:
    rows = _rows(source, quiet)
    for column in [*source.text, *([] if classes is None else [source.label])]:
        if column not in rows.column_names:
            raise KarcherError(
                f"{source.data} has no column {column}, but {', '.join(rows.column_names)}: name "
                "the ones to take by --text and --label."
            )
    names: Any = None
    # A model whose classes have only the names that transformers gives takes numbers as they are.
    if classes is not None and any(name != f"LABEL_{i}" for name, i in classes.items()):
        names = getattr(rows.features.get(source.label), "names", None)
        if {name.lower() for name in names or ()} - {name.lower() for name in classes}:
            raise KarcherError(
                f"{source.data} has the classes {', '.join(names)} ({source.label}), but the model "
                f"{', '.join(classes)}: name the column of the model's classes by --label."
            )
    examples = []
    for row in rows.select(_chosen(source, len(rows))):
        ids = _tokens([row[column] for column in source.text], tokenizer, source)
        label = None if classes is None else _class(row[source.label], names, classes, source)
        examples.append(Example(ids, label))
    return [example for example in examples if len(example.ids) > 1]


def _rows(source: Source, quiet: bool) -> Any:
    try:
        import datasets
    except ImportError:
        raise KarcherError(
            f"Reading {source.data} needs the package datasets: pip install "
            "'mergekit-karcher[fisher]', or give a plain text."
        ) from None

    # What it logs comes back as an error.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if quiet:
        datasets.disable_progress_bars()
    kind = _RECORDS.get(Path(source.data).suffix)
    try:
        if kind is not None:
            return datasets.load_dataset(kind, data_files=source.data, split="train")
        return datasets.load_dataset(source.data, source.subset, split=source.split)
    except Exception as error:
        # What went wrong is often only said by the error behind it.
        raise KarcherError(
            f"{source.data} cannot be read ({first_line(error.__cause__ or error)}): give a text, "
            "a file of records (.jsonl, .json, .csv, .parquet), or a dataset."
        ) from None


def _tokens(parts: Sequence[Any], tokenizer: Any, source: Source) -> list[int]:
    if isinstance(parts[0], list):
        try:
            text = tokenizer.apply_chat_template(parts[0], tokenize=False)
        except Exception as error:
            raise KarcherError(
                f"A conversation of {source.data} cannot be written as text ({first_line(error)}): "
                "take a column of text by --text, or a model with a chat template."
            ) from None
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return list(ids[: source.length])
    if any(part is None for part in parts):
        return []
    if not all(isinstance(part, str) for part in parts):
        raise KarcherError(
            f"{', '.join(source.text)} of {source.data} holds {type(parts[0]).__name__}, not text: "
            "name a column of text by --text."
        )
    return list(tokenizer(*parts, truncation=True, max_length=source.length).input_ids)


def _class(
    value: Any, names: Sequence[str] | None, classes: Mapping[str, int], source: Source
) -> int:
    """The model's number of a class, which a dataset may number in another order."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        value = names[value]
    if isinstance(value, str):
        numbers = {name.lower(): number for name, number in classes.items()}
        value = numbers.get(value.lower(), value)
    if not isinstance(value, int) or not 0 <= value < len(classes):
        known = ", ".join(list(classes)[:5])
        raise KarcherError(
            f"A record of {source.data} is of class {value!r} ({source.label}), but the model "
            f"knows {len(classes)}: {known}; leave such records out, or name the column by --label."
        )
    return value
