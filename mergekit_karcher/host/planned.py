"""A merge that mergekit has planned, cut into units that can be done one by one."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from mergekit.common import dtype_from_name
from mergekit.graph import Executor, TaskUniverse
from mergekit.io.tasks import SaveTensor
from mergekit.tokenizer import BuildTokenizer

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.graph import changes_tokens, loader_of, loads_of
from mergekit_karcher.host.headers import Header, torch_dtype
from mergekit_karcher.host.preflight import Checkpoints, input_problems
from mergekit_karcher.host.run import MergeRun
from mergekit_karcher.host.tasks import MergeTensor, ModelMean, WriteReport


@dataclass(frozen=True)
class Unit:
    """Work that is done as a whole or not at all.

    name: of the file with its result. places: the tensors, by their place in the plan. sizes: the
    bytes of each output tensor, planned from headers. whole_model: whether it only takes inner
    products, for a mean over the whole model; otherwise its result is a shard.
    """

    name: str
    places: tuple[int, ...]
    sizes: tuple[int, ...]
    whole_model: bool

    @property
    def bytes(self) -> int:
        """Those of all its output tensors."""
        return sum(self.sizes)


class PlannedMerge:
    """One merge: its output tensors in order, and the units that they are merged in.

    Arguments:
        tasks: The plan, as mergekit would execute it.
        options: mergekit's `MergeOptions`.

    units: All of them, those over the whole model first.
    tokenizer: What mergekit's `BuildTokenizer` made, or None.

    Raises:
        KarcherError: If the headers of the inputs do not fit together.
    """

    def __init__(self, tasks: Sequence[Any], options: Any) -> None:
        self._options = options
        self._universe = TaskUniverse(tasks)
        self._known: dict[Any, Any] = {}
        self.report = next((task for task in tasks if isinstance(task, WriteReport)), None)
        self._checkpoints = Checkpoints()
        saves = [task for task in tasks if isinstance(task, SaveTensor)]
        for problem in input_problems(map(_merge_of, saves), self._checkpoints):
            raise KarcherError(problem)
        self._saves = [save for save in saves if self._is_there(save)]
        self.tokenizer_task = next((t for t in tasks if isinstance(t, BuildTokenizer)), None)
        self.tokenizer = None
        if self.tokenizer_task is not None:
            with _vocabularies_in_order():
                self.tokenizer = self._value_of(self.tokenizer_task)
            self._known[self.tokenizer_task] = self.tokenizer
        means = (getattr(save.tensor_task, "mean", None) for save in saves)
        self._mean_task: ModelMean | None = next((mean for mean in means if mean), None)
        self.units = [*self._units_of_model(), *self._shards()]

    @property
    def run(self) -> MergeRun | None:
        """The run of a merge of ours."""
        runs = (getattr(save.tensor_task, "run", None) for save in self._saves)
        return next((run for run in runs if run is not None), None)

    def name(self, place: int) -> str:
        """What the output tensor at that place is called."""
        return str(self._saves[place].tensor_name)

    def reads(self, place: int, *, whole_model: bool = False) -> list[tuple[Path, str]]:
        """The tensors that an output tensor is made of: files, and names in them.

        whole_model: whether the place is that of a part of the model.
        """
        merge = self._parts[place].merge if whole_model else _merge_of(self._saves[place])
        return [
            (Path(index.base_path, index.tensor_paths[name]), name)
            for _, load in loads_of(merge)
            for index in [loader_of(load).index]
            for name in self._checkpoints.sources(load)
        ]

    def input_files(self) -> list[Path]:
        """Every file that the merge reads, once."""
        paths = {path for place in range(len(self._saves)) for path, _ in self.reads(place)}
        return sorted(paths)

    def bytes_to_read(self) -> int:
        """Bytes of all inputs in their files, counted as often as they are read."""
        merges = [_merge_of(save) for save in self._saves] + [part.merge for part in self._parts]
        return sum(
            header.size * torch_dtype(header).itemsize
            for merge in merges
            for header in self._headers(merge)
        )

    def memory(self) -> int:
        """Bytes of the largest output tensor with its inputs, in the dtype they are cast to."""
        return max(map(self._bytes_at_work, range(len(self._saves))), default=0)

    def tensor(self, place: int) -> torch.Tensor | None:
        """Merge a tensor; None for one that mergekit's plan allows to be missing.

        The CPU tensor, contiguous, in the dtype that it is saved in.
        """
        save = self._saves[place]
        self._seed(save.tensor_name)
        tensor = self._value_of(save.tensor_task)
        if tensor is None:
            if not save.optional:
                raise KarcherError(f"The merge gave no value for {save.tensor_name}.")
            return None
        dtype = dtype_from_name(save.dtype) if save.dtype else tensor.dtype
        result: torch.Tensor = tensor.to(device="cpu", dtype=dtype).contiguous()
        return result

    def products(self, place: int) -> Any:
        """The inner products of the inputs of a part of the model; None for a buffer."""
        return self._value_of(self._parts[place])

    def take_mean(self, products: Iterable[Any]) -> Any:
        """The mean of whole models from the inner products of all parts, in the order of places."""
        if self._mean_task is None:
            return None
        return self._mean_task.execute(**{str(i): part for i, part in enumerate(products)})

    def know_mean(self, mean: Any) -> None:
        """Have tensors merged with that mean of whole models."""
        if self._mean_task is not None:
            self._known[self._mean_task] = mean

    def _value_of(self, task: Any) -> Any:
        """Execute one task and what it needs, by mergekit's executor."""
        storage = self._options.device if self._options.low_cpu_memory else "cpu"
        known = {self._universe.add_task(task): value for task, value in self._known.items()}
        executor = Executor(
            [self._universe.add_task(task)], self._options.device, storage, cached_values=known
        )
        ((_, value),) = executor.run(quiet=True)
        return value

    def _seed(self, name: str) -> None:
        """Give methods that draw numbers the same ones for a tensor, whatever came before it."""
        text = f"{self._options.random_seed or 0} {name}"
        digest = hashlib.sha256(text.encode()).digest()
        transformers.trainer_utils.set_seed(int.from_bytes(digest[:4], "little"))

    def _is_there(self, save: Any) -> bool:
        """Whether any model has what a tensor that may be missing is made of."""
        loads = [load for _, load in loads_of(_merge_of(save))]
        return not save.optional or any(map(self._checkpoints.sources, loads))

    @property
    def _parts(self) -> tuple[Any, ...]:
        return () if self._mean_task is None else self._mean_task.parts

    @cached_property
    def _sizes(self) -> list[int]:
        return [self._bytes_of(_merge_of(save), save.dtype) for save in self._saves]

    def _units_of_model(self) -> Iterator[Unit]:
        sizes = [self._bytes_of(part.merge, None) for part in self._parts]
        for number, places in enumerate(_grouped(sizes, self._options.out_shard_size), 1):
            of_places = tuple(sizes[place] for place in places)
            yield Unit(f"products-{number:05d}", places, of_places, whole_model=True)

    def _shards(self) -> Iterator[Unit]:
        groups = list(_grouped(self._sizes, self._options.out_shard_size))
        for number, places in enumerate(groups, 1):
            name = f"model-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else "model"
            of_places = tuple(self._sizes[place] for place in places)
            yield Unit(f"{name}.safetensors", places, of_places, whole_model=False)

    def _bytes_of(self, merge: Any, saved_as: str | None) -> int:
        """Planned bytes of what comes of a merge task."""
        headers = self._headers(merge)
        if not headers:
            return 0
        shape = list(headers[0].shape)
        axis = merge.output_weight.vocabulary_axis
        if axis is not None and self.tokenizer is not None and changes_tokens(merge):
            multiple = getattr(merge.gather_tensors, "pad_to_multiple_of", None) or 1
            count = len(self.tokenizer.tokenizer.get_vocab())
            shape[axis] = -(-count // multiple) * multiple
        dtype = saved_as or merge.out_dtype or _dtype_at_work(merge)
        return math.prod(shape) * _itemsize(dtype, headers[0])

    def _headers(self, merge: Any) -> list[Header]:
        """Those of everything that a merge task reads; the stack of fused experts as one."""
        found = []
        for _, load in loads_of(merge):
            headers, sources = self._checkpoints.headers(load), self._checkpoints.sources(load)
            if sources:
                size = sum(headers[name].size for name in sources)
                first = headers[sources[0]]
                found.append(first if len(sources) == 1 else first._replace(shape=(size,)))
        return found

    def _bytes_at_work(self, place: int) -> int:
        merge = _merge_of(self._saves[place])
        dtype = _dtype_at_work(merge)
        inputs = (header.size * _itemsize(dtype, header) for header in self._headers(merge))
        return sum(inputs) + self._sizes[place]


@contextmanager
def _vocabularies_in_order() -> Iterator[None]:
    """Have mergekit unite vocabularies in the same order in every process.

    It goes through them as `get_vocab` gives them, which is in another order each time.
    """
    tokenizer = transformers.PreTrainedTokenizerFast
    get_vocab = tokenizer.get_vocab

    def in_order(self: Any) -> dict[str, int]:
        return dict(sorted(get_vocab(self).items(), key=operator.itemgetter(1)))

    with mock.patch.object(tokenizer, "get_vocab", in_order):
        yield


def _merge_of(save: Any) -> Any:
    """mergekit's own task for a saved tensor, which ours stand for."""
    task = save.tensor_task
    return task.merge if isinstance(task, MergeTensor) else task


def _dtype_at_work(merge: Any) -> str | None:
    """mergekit's name of the dtype that the inputs of a merge task are cast to, if they are."""
    loads = (load.dtype for _, load in loads_of(merge))
    return merge.dtype or next(loads, None)


def _itemsize(name: str | None, header: Header) -> int:
    """Bytes of an element of that dtype, or else of that of a file."""
    return int((dtype_from_name(name) if name else torch_dtype(header)).itemsize)


def _grouped(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, ...]]:
    """Places of neighbours that are at most that large together; one alone may be larger."""
    group: list[int] = []
    for place, size in enumerate(sizes):
        if group and limit > 0 and sum(sizes[p] for p in group) + size > limit:
            yield tuple(group)
            group = []
        group.append(place)
    if group:
        yield tuple(group)
