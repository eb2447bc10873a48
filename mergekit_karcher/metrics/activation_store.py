"""Activation metrics on disk: a file for each part of a model, with the checkpoint's names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import PARTIAL, replacing, write_text
from mergekit_karcher.host.activation_metrics import KIND, SCHEMA
from mergekit_karcher.metrics import low_rank
from mergekit_karcher.metrics.activations import Measured
from mergekit_karcher.metrics.skeleton import Skeleton

# What the folder of a metric that is not finished has: all that decides its numbers.
STATE_FILE = "partial.json"

_INDEX_FILE = "model.safetensors.index.json"


class Contents(NamedTuple):
    """What a file of a metric, or all of them together, has of the tensors of a checkpoint.

    grams: the entry of each weight that has an input Gram, named after the first weight that it
    is of. unused: the number of inputs of linear layers that no token reached. shapes: of the
    tensors whose metric is the same along an axis.
    """

    grams: dict[str, str]
    unused: dict[str, int]
    shapes: dict[str, list[int]]

    def add(self, other: Contents) -> None:
        """Add what another file has."""
        self.grams.update(other.grams)
        self.unused.update(other.unused)
        self.shapes.update(other.shapes)


class Folder:
    """The folder of a metric that is being made, with a file for each part of a model.

    Arguments:
        path: Where it is. It is made; or it holds an unfinished run with the same settings.
        parts: How many files it will have.
        decisive: All that decides the numbers, as JSON can hold it.

    Raises:
        KarcherError: If there is anything else in the folder, or a run with other settings.
    """

    def __init__(self, path: Path, parts: int, decisive: Mapping[str, Any]) -> None:
        self.path, self._parts = path, parts
        now = json.loads(json.dumps({**decisive, "parts": parts}))
        if is_unfinished(path):
            before = json.loads((path / STATE_FILE).read_text("utf-8"))
            differences = [key for key in now if now[key] != before.get(key)]
            if differences:
                raise KarcherError(
                    f"{path} holds an unfinished run with other {', '.join(differences)}: name a "
                    "new folder by --out, or delete that one."
                )
            return
        check_new(path)
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / STATE_FILE, json.dumps(now, indent=1) + "\n")

    def file(self, index: int) -> Path:
        """Where the metric of a part goes."""
        return self.path / f"model-{index + 1:05d}-of-{self._parts:05d}.safetensors"

    @property
    def finished(self) -> int:
        """How many parts, from the first on, are there."""
        return next((i for i in range(self._parts) if not self.file(i).exists()), self._parts)

    def check_weights(self, index: int, weights: str) -> None:
        """Raise `KarcherError` if a part that is there was made of other weights."""
        if self._metadata(index)["weights"] != weights:
            raise KarcherError(
                f"{self.file(index)} was made of other weights: the model has changed since, so "
                "name a new folder by --out."
            )

    def write(
        self, index: int, tensors: dict[str, Tensor], contents: Contents, weights: str
    ) -> None:
        """Write the metric of a part, whole or not at all.

        Arguments:
            index: Of the part.
            tensors: As they are stored, on the CPU.
            contents: What they are of.
            weights: A fingerprint of the part's weights.
        """
        metadata = {"contents": json.dumps(contents._asdict()), "weights": weights}
        with replacing(self.file(index)) as partial:
            save_file(tensors, partial, {"format": "pt", **metadata})

    def finish(self, reference: str, stored: Iterable[str], about: Mapping[str, Any]) -> Contents:
        """Write the index and metric.json, after which the metric is whole.

        Arguments:
            reference: The model.
            stored: The tensors of its checkpoint that have a metric.
            about: What else is to be said.

        Returns:
            What the metric is of.
        """
        contents = Contents({}, {}, {})
        paths: dict[str, str] = {}
        for index in range(self._parts):
            with safe_open(self.file(index), framework="pt") as file:
                contents.add(Contents(**json.loads(file.metadata()["contents"])))
                paths |= dict.fromkeys(file.keys(), self.file(index).name)
        known = {*contents.grams, *contents.unused, *paths}
        facts = {
            **contents._asdict(),
            "ones": sorted(set(stored) - known),
            "weights": [self._metadata(index)["weights"] for index in range(self._parts)],
        }
        write_text(self.path / _INDEX_FILE, json.dumps({"metadata": {}, "weight_map": paths}))
        header = {"schema": SCHEMA, "version": __version__, "model": reference, "kind": KIND}
        write_text(self.path / "metric.json", json.dumps({**header, **about, **facts}) + "\n")
        (self.path / STATE_FILE).unlink()
        return contents

    def _metadata(self, index: int) -> dict[str, str]:
        with safe_open(self.file(index), framework="pt") as file:
            metadata: dict[str, str] = file.metadata()
        return metadata


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a run of this kind that was cut off."""
    return (folder / STATE_FILE).is_file()


def check_new(folder: Path) -> None:
    """Raise `KarcherError` if a folder holds anything but what a write that failed has left."""
    if folder.exists() and any(not p.name.endswith(PARTIAL) for p in folder.iterdir()):
        raise KarcherError(f"{folder} exists: name a new folder by --out.")


def as_stored(measured: Measured, skeleton: Skeleton) -> tuple[dict[str, Tensor], Contents]:
    """Metrics by the names of the checkpoint, as they are written.

    Arguments:
        measured: The metrics of a part of the network, which are taken out of it one by one.
        skeleton: Knows the names.
    """
    tensors: dict[str, Tensor] = {}
    contents = Contents({}, {}, {})
    entries: dict[str, list[str]] = {}
    for name, first in measured.first_of.items():
        if first == name:
            entries[first] = [sources[0] for sources in skeleton.layers(first)]
            gram = measured.grams.pop(first)
            is_stack = gram.ndim == 3 and skeleton.weights.axes(entries[first][0]) == 2
            for index, entry in enumerate(entries[first]):
                part = gram[index] if is_stack else gram
                tensors.update(_entry(entry, part, skeleton.device))
        for entry, sources in zip(entries[first], skeleton.layers(name), strict=True):
            contents.grams.update(dict.fromkeys(sources, entry))
    for name, width in measured.unused.items():
        contents.unused.update(dict.fromkeys(skeleton.sources(name), width))
    for name, rows in measured.rows.items():
        (source,) = skeleton.sources(name)
        tensors[source] = rows[:, None]
        contents.shapes[source] = list(skeleton.model.get_parameter(name).shape)
    for name, elements in measured.elements.items():
        (source,) = skeleton.sources(name)
        tensors[source] = elements
    return tensors, contents


def _entry(name: str, gram: Tensor, device: torch.device) -> dict[str, Tensor]:
    """An input Gram as it is stored, dense or in factors, which are computed on that device."""
    width = gram.shape[-1]
    if width <= low_rank.DENSE_WIDTH:
        return {f"{name}.input_gram": gram.contiguous()}
    factors = low_rank.factored(gram.to(device), width // low_rank.SHARE_OF_RANK)
    return {
        f"{name}.input_gram_factor": factors.factor.cpu().contiguous(),
        f"{name}.input_gram_diagonal": factors.diagonal.cpu().contiguous(),
    }
