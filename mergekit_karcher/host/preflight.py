"""What will stop a merge or make its result incomplete, seen before any weights are read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mergekit_karcher.host import compat
from mergekit_karcher.host.graph import (
    changes_vocabulary,
    loader_of,
    loads_of,
    model_type_of,
    names_of,
    only_tied,
    ties_head,
)
from mergekit_karcher.host.headers import (
    FLOATS,
    Header,
    headers_of,
    identical,
    is_constant,
    may_be_constant,
)
from mergekit_karcher.host.rows import RowLayout, is_head, is_layer, row_layout

_NAMES_SHOWN = 3
_LAYER = re.compile(r"\.\d+(?=\.)")


class Checkpoints:
    """The checkpoints of one plan: what they hold by their headers, each read once."""

    def __init__(self) -> None:
        self._headers: dict[int, dict[str, Header]] = {}
        self._targets: dict[int, dict[str, list[str]]] = {}
        self._types: dict[str, str | None] = {}

    def headers(self, load: Any) -> dict[str, Header]:
        """Those of the checkpoint that a load task reads."""
        loader = loader_of(load)
        if id(loader) not in self._headers:
            self._headers[id(loader)] = headers_of(loader.index)
        return self._headers[id(loader)]

    def sources(self, load: Any) -> list[str]:
        """What a load task reads: the name of one tensor, or those that it is put together from."""
        loader = loader_of(load)
        paths = loader.index.tensor_paths
        direct = next((name for name in names_of(load) if name in paths), None)
        if direct is not None:
            return [direct]
        if id(loader) not in self._targets:
            self._targets[id(loader)] = compat.conversion_sources(self.model_type(load), paths)
        targets = self._targets[id(loader)]
        return next((targets[name] for name in names_of(load) if name in targets), [])

    def header(self, load: Any) -> Header | None:
        """That of the one tensor that a load task reads; None if it reads none or several."""
        sources = self.sources(load)
        return self.headers(load).get(sources[0]) if len(sources) == 1 else None

    def model_type(self, load: Any) -> str | None:
        """What transformers calls the family of a load task's model; None for a raw checkpoint."""
        model = str(load.model)
        if model not in self._types:
            self._types[model] = model_type_of(load)
        return self._types[model]

    def is_constant(self, merge: Any) -> bool:
        """Whether every input of a merge task is a buffer that the network computes anew."""
        headers = self._of_inputs(merge)
        name = merge.output_weight.name
        return bool(headers) and all(is_constant(name, header.shape) for header in headers)

    def is_whole_numbers(self, merge: Any) -> bool:
        """Whether every input of a merge task is of integers or truth values."""
        headers = self._of_inputs(merge)
        return bool(headers) and all(
            header.dtype not in FLOATS and not header.dtype.startswith("F") for header in headers
        )

    def row_layout(self, merge: Any) -> RowLayout:
        """Where the output units of a merge task's weight lie."""
        load = next(load for _, load in loads_of(merge))
        name, header = merge.output_weight.name, self.header(load)
        # Only stacks of matrices are put together from several tensors.
        axes = 3 if header is None else len(header.shape)
        return row_layout(self.model_type(load), name, axes)

    def is_layer(self, merge: Any) -> bool:
        """Whether the weight of a merge task is that of linear layers, or of a convolution."""
        headers = self._of_inputs(merge)
        shape = headers[0].shape if headers else (1, 1, 1)
        return is_layer(merge.output_weight.name, shape) and not self._is_embedding(merge)

    def _is_embedding(self, merge: Any) -> bool:
        """Whether it has a vocabulary on one axis, and is no head that has its own tensor."""
        if merge.output_weight.vocabulary_axis is None:
            return False
        load = next(load for _, load in loads_of(merge))
        return not is_head(merge.output_weight.name) or ties_head(load)

    def present(self, merges: Iterable[Any]) -> list[Any]:
        """The merge tasks, but for those whose tensor no model has or needs, in any layer.

        mergekit asks for masks and the like that the transformers of today no longer saves.
        """
        return [merge for merge in merges if not self._is_unknown(merge)]

    def counted_once(self, merges: Iterable[Any]) -> list[Any]:
        """The merge tasks whose inputs count: each tensor of a checkpoint once.

        A plan may read one twice: tied weights, or a module that is part of two.
        """
        counted: dict[Any, Any] = {}
        for merge in merges:
            read = tuple((str(model), *self.sources(load)) for model, load in loads_of(merge))
            if not only_tied(merge):
                counted.setdefault(read, merge)
        return list(counted.values())

    def _is_unknown(self, merge: Any) -> bool:
        loads = [load for _, load in loads_of(merge)]
        if any(self.sources(load) for load in loads):
            return False
        names = [name for load in loads for name in names_of(load)]
        is_tied = merge.output_weight.vocabulary_axis is not None and ties_head(loads[0])
        needed = not all(load.optional for load in loads) and not is_tied
        if needed and not any(map(may_be_constant, names)):
            return False
        kinds = {_LAYER.sub(".#", name) for load in loads for name in self.headers(load)}
        return not any(_LAYER.sub(".#", name) in kinds for name in names)

    def _of_inputs(self, merge: Any) -> list[Header]:
        headers = (self.header(load) for _, load in loads_of(merge))
        return [header for header in headers if header is not None]


def problems(merges: Sequence[Any], checkpoints: Checkpoints, *, sliced: bool) -> Iterator[str]:
    """What will stop a merge, or be missing from its result: a sentence for each.

    sliced: whether the config names layers itself, so that others are left out on purpose.
    """
    yield from input_problems(merges, checkpoints)
    for merge in merges:
        if checkpoints.is_whole_numbers(merge):
            yield from _unequal_numbers(merge)
    if not drops(merges):
        for words in left_out(merges, checkpoints, sliced=sliced):
            yield (
                f"{words}: mergekit-pytorch would merge all tensors of models that are one file "
                "each (save them with a max_shard_size that is large enough), and left_out: drop "
                "under parameters does without these."
            )


def input_problems(merges: Iterable[Any], checkpoints: Checkpoints) -> Iterator[str]:
    """What would stop a merge by any method: a sentence for each."""
    merges = list(merges)
    yield from _nowhere(merges, checkpoints)
    for merge in merges:
        yield from _missing(merge, checkpoints)
        yield from _unequal_shapes(merge, checkpoints)


def drops(merges: Iterable[Any]) -> bool:
    """Whether the result of merge tasks may lack what mergekit has not planned."""
    return any(merge.parameters["left_out"] == "drop" for merge in merges)


def _nowhere(merges: Sequence[Any], checkpoints: Checkpoints) -> Iterator[str]:
    """Tensors that mergekit needs and no model has, as at most one sentence."""
    names = [
        str(merge.output_weight.name)
        for merge in merges
        if not any(checkpoints.sources(load) for _, load in loads_of(merge))
        and not all(load.optional for _, load in loads_of(merge))
    ]
    if not names:
        return
    model = str(next(model for model, _ in loads_of(merges[0])))
    if len(names) == len(merges):
        yield (
            f"None of the {len(names)} tensors that mergekit expects ({_shown(names)}) is in the "
            f"files of {model}: check that architectures in its config.json is what they hold."
        )
        return
    yield (
        f"mergekit wants to merge what no model has ({_shown(names)}): check layer_range, and "
        "whether architectures in their config.json is that of these files."
    )


def _shown(names: Sequence[str]) -> str:
    """The first of some names, with a count where there are more."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return shown if more <= 0 else f"{shown} and {more} more"


def _missing(merge: Any, checkpoints: Checkpoints) -> Iterator[str]:
    """A tensor that mergekit needs of a model that does not have it."""
    loads = list(loads_of(merge))
    lacking = [str(model) for model, load in loads if not checkpoints.sources(load)]
    needed = not all(getattr(load, "optional", True) for _, load in loads)
    if needed and 0 < len(lacking) < len(loads):
        yield (
            f"{lacking[0]} has no {merge.output_weight.name}, which other models have and mergekit "
            "needs of every one: load that model with transformers and save it anew, or do without "
            "it."
        )


def missing_in_some(merges: Sequence[Any], checkpoints: Checkpoints) -> Iterator[str]:
    """Tensors that some raw checkpoints lack, as at most one sentence."""
    lacking = [
        (merge.output_weight.name, str(model))
        for merge in merges
        for model, load in loads_of(merge)
        if not hasattr(load, "optional") and not checkpoints.sources(load)
    ]
    if lacking:
        name, model = min(lacking)
        yield (
            f"{model} has no {name}, which other models have ({len(lacking)} such cases): "
            "mergekit-pytorch stops there unless it is given --tensor-union or "
            "--tensor-intersection."
        )


def _unequal_shapes(merge: Any, checkpoints: Checkpoints) -> Iterator[str]:
    if changes_vocabulary(merge):
        return
    headers = [(str(model), checkpoints.header(load)) for model, load in loads_of(merge)]
    known = [(model, header.shape) for model, header in headers if header is not None]
    other = next(((model, shape) for model, shape in known if shape != known[0][1]), None)
    if other is None:
        return
    name, (first, shape) = merge.output_weight.name, known[0]
    if merge.output_weight.vocabulary_axis is not None:
        remedy = "their vocabularies differ, which tokenizer: {source: union} mends"
    else:
        remedy = "merge models of one architecture and size"
    yield f"{name} is {list(shape)} in {first}, but {list(other[1])} in {other[0]}: {remedy}."


def _unequal_numbers(merge: Any) -> Iterator[str]:
    """Whole numbers of which there is no mean."""
    values = []
    for model, load in loads_of(merge):
        tensor = load.model_copy(update={"dtype": None}).execute()
        if tensor is not None:
            values.append((str(model), tensor))
    if values and not identical(tensor for _, tensor in values):
        first, other = values[0], next(v for v in values if not identical([v[1], values[0][1]]))
        yield (
            f"{merge.output_weight.name} holds whole numbers, of which there is no mean, and they "
            f"differ in {first[0]} and {other[0]}: remove it from their files, or have "
            "mergekit-karcher align give both the same."
        )


def left_out(merges: Sequence[Any], checkpoints: Checkpoints, *, sliced: bool) -> Iterator[str]:
    """Tensors of every model that mergekit has not planned, as at most one statement."""
    read: dict[str, set[str]] = defaultdict(set)
    headers: dict[str, Mapping[str, Header]] = {}
    for merge in merges:
        for model, load in loads_of(merge):
            read[str(model)].update(checkpoints.sources(load))
            headers[str(model)] = checkpoints.headers(load)
    unread = [
        {n for n, h in of_model.items() if n not in read[model] and not is_constant(n, h.shape)}
        for model, of_model in headers.items()
    ]
    names = set.intersection(*unread)
    if sliced:
        layers = {_LAYER.sub(".#", name) for of_model in read.values() for name in of_model}
        names = {name for name in names if _LAYER.sub(".#", name) not in layers}
    if not names:
        return
    first = next(iter(headers.values()))
    share = sum(first[n].size for n in names) / max(1, sum(h.size for h in first.values()))
    yield (
        f"The result lacks {len(names)} tensors that every model has and mergekit does not plan, "
        f"{100 * share:.2g} % of the parameters ({_shown(sorted(names))})"
    )
