"""A network block after block: what each is called with, without running the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Calls(NamedTuple):
    """How a network calls its blocks for one batch.

    hidden: what goes into the first, on the CPU. others: what each is given beside hidden states,
    positional and by name; on the network's device, equal tensors of batches in the same memory.
    """

    hidden: Tensor
    others: list[tuple[tuple[Any, ...], dict[str, Any]]]


class Blocks:
    """The blocks of a network that runs them one after the other; borrowed.

    Arguments:
        model: The network.
        name: What the list of its blocks is called.
        blocks: Those blocks.
    """

    def __init__(self, model: nn.Module, name: str, blocks: Sequence[nn.Module]) -> None:
        self.model, self.name, self._blocks = model, name, list(blocks)
        self._returns_tuple = False
        self._last: Calls | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> nn.Module:
        return self._blocks[index]

    def calls(self, ids: Tensor) -> Calls | None:
        """What the blocks are called with for a batch of tokens; their weights are not needed.

        Returns:
            None if the network does more than hand the hidden states from block to block, so that
            it cannot be run block after block.
        """
        for returns_tuple in (self._returns_tuple, not self._returns_tuple):
            self._returns_tuple = returns_tuple
            calls = self._traced(ids)
            if calls is not None:
                if self._last is not None:
                    calls = Calls(calls.hidden, _sharing(calls.others, self._last.others))
                self._last = calls
                return calls
        return None

    def run(self, index: int, hidden: Tensor, calls: Calls, device: torch.device) -> Tensor:
        """The hidden states after a block, whose weights are loaded; all on the CPU but the block.

        Arguments:
            index: Of the block.
            hidden: Its inputs, (batch, length, width).
            calls: What it is called with.
            device: Where the block is.
        """
        args, kwargs = calls.others[index]
        output = self._blocks[index](hidden.to(device), *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result.to("cpu")

    def run_rest(self, ids: Tensor, hidden: Tensor) -> None:
        """Run what comes before and after the blocks, given what comes out of the last of them."""
        last = len(self) - 1

        def reply(index: int, given: Tensor, _args: Any, _kwargs: Any) -> Tensor:
            return hidden.to(given.device) if index == last else given

        with self._replying(reply):
            self.model(input_ids=ids, **_without_cache(self.model))

    def _traced(self, ids: Tensor) -> Calls | None:
        others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []
        previous: Tensor | None = None

        def reply(index: int, hidden: Tensor, args: Any, kwargs: Any) -> Tensor:
            nonlocal previous
            is_next = index == len(others) and (previous is None or hidden is previous)
            if not is_next or not all(map(_is_plain, (*args, *kwargs.values()))):
                raise _NotSequentialError
            first.append(hidden)
            others.append((args, kwargs))
            previous = hidden
            if index == len(self) - 1:
                raise _StopForwardError
            return hidden

        try:
            with self._replying(reply):
                self.model(input_ids=ids, **_without_cache(self.model))
        except _StopForwardError:
            return Calls(first[0].to("cpu", copy=True), others)
        except (_NotSequentialError, RuntimeError, AttributeError, IndexError, TypeError):
            # A network that does anything else with what a block returns.
            return None
        return None

    @contextmanager
    def _replying(self, reply: Callable[..., Tensor]) -> Iterator[None]:
        """Have the blocks return what a function gives, which is called instead of each."""
        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                # Not another module in its place: networks ask their blocks what kind they are.
                block.forward = self._forward(index, reply)
                stack.callback(block.__delattr__, "forward")
            yield

    def _forward(self, index: int, reply: Callable[..., Tensor]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, *rest = args
            else:
                hidden, rest = kwargs.pop("hidden_states"), []
            replied = reply(index, hidden, tuple(rest), kwargs)
            return (replied,) if self._returns_tuple else replied

        return forward


def find_blocks(model: nn.Module) -> Blocks | None:
    """The blocks that most of a network's parameters are in; None if it has no list of modules."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    if not outer:
        return None
    largest = max(outer, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    return Blocks(model, largest, list(lists[largest]))


class _StopForwardError(Exception):
    """All that was asked for is known."""


class _NotSequentialError(Exception):
    """The hidden states do not go from each block to the next as they are."""


def _without_cache(model: nn.Module) -> dict[str, bool]:
    config: Any = model.config
    return {"use_cache": False} if hasattr(config, "use_cache") else {}


def _is_plain(value: Any) -> bool:
    """Whether it is the same in every call: what holds a state, like a cache, is not."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def _sharing(values: Any, earlier: Any) -> Any:
    """The same values, with the tensors of an earlier batch where they are equal."""
    if isinstance(values, (tuple, list)) and type(values) is type(earlier):
        if len(values) != len(earlier):
            return values
        return type(values)(_sharing(v, e) for v, e in zip(values, earlier, strict=True))
    if isinstance(values, dict) and isinstance(earlier, dict):
        return {key: _sharing(value, earlier.get(key)) for key, value in values.items()}
    if isinstance(values, Tensor) and isinstance(earlier, Tensor):
        return earlier if values is earlier or _equal(values, earlier) else values
    return values


def _equal(first: Tensor, second: Tensor) -> bool:
    alike = first.shape == second.shape and first.dtype == second.dtype
    return alike and bool(torch.equal(first, second))
