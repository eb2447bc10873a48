"""Second moments of what a model's weights are multiplied with, from forward passes alone.

A change E of a weight changes what the weight gives for an input x by E x. The mean over tokens of
|E x|^2 is tr(E A E') with A = E[x x']: the input Gram of a linear layer. For an embedding, whose x
is one of the rows' numbers, A is diagonal and says how often each row occurs; for a norm, whose
weight is multiplied element by element, it is the second moment of each element.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.means.input_gram import InputGram

# Where functions that multiply by a weight, or look up its rows, take the inputs and the weight.
_OPERANDS = {
    "linear": (0, 1),
    "matmul": (0, 1),
    "__matmul__": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "embedding": (0, 1),
}

# Those that some networks call with the weight first.
_FROM_THE_LEFT = ("matmul", "__matmul__", "mm")

# Rows that are multiplied in float32 before the product is added to a float64 sum.
_ROWS = 4096

# Columns of a Gram that are computed together, from the diagonal on: it is symmetric.
_COLUMNS = 256


class Measured(NamedTuple):
    """The metrics of some weights, by the names that the network has for them.

    grams: A, float32, (in, in), or (experts, in, in) for stacked experts; by the first of the
    weights that share an input. first_of: that first weight, of each weight. rows: for each
    embedding how often each row occurs per token, (rows,) float32. elements: the second moments of
    what each norm's weight is multiplied with, (width,) float32. unused: the number of inputs of
    linear layers that no token reached.
    """

    grams: dict[str, Tensor]
    first_of: dict[str, str]
    rows: dict[str, Tensor]
    elements: dict[str, Tensor]
    unused: dict[str, int]


class ActivationSums:
    """Sums over tokens, of the weights of a network or of a part of it, which is borrowed.

    Every product with a weight is seen where torch computes it, so it does not matter what kind of
    module it is in; products of the network's own kernels are not seen, nor are convolutions.
    Products of up to 4096 rows are taken in float32 and summed in float64, on the weights' device.

    Arguments:
        parameters: The weights to watch, by name; tied ones once.
        modules: Where they are.
        unneeded: A weight whose outputs nobody needs, such as that of a head: instead of its
            product, the first element of each input is returned. It may be on the meta device.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        modules: Iterable[nn.Module],
        unneeded: str | None = None,
    ) -> None:
        self._parameters, self._unneeded = dict(parameters), unneeded
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._stored = {
            parameter.untyped_storage().data_ptr(): name
            for name, parameter in parameters.items()
            if not parameter.is_meta
        }
        of_weights = [
            (self._names[id(module.weight)], module)
            for module in modules
            if id(getattr(module, "weight", None)) in self._names
        ]
        self._norms = {name: module for name, module in of_weights if _is_norm(module)}
        self._tables = {name for name, module in of_weights if isinstance(module, nn.Embedding)}
        self._linear = dict(_widths(of_weights))
        self._grams: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self._elements: dict[str, Tensor] = {}
        self._first_of: dict[str, str] = {}
        self._inputs: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
        self._is_measuring = False
        self._examples = 1

    @contextmanager
    def watching(self, examples: int) -> Iterator[None]:
        """Add what the network computes in the block, which is one forward pass.

        Arguments:
            examples: How many there are in the batch.
        """
        self._examples = examples
        with ExitStack() as stack:
            for name, module in self._norms.items():
                hook = module.register_forward_hook(self._norm_hook(name), with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(_Watch(self))
            yield
        # While these were kept, no other tensor could take their place in memory.
        self._inputs.clear()

    def measured(self, tokens: int) -> Measured:
        """The sums divided by the number of tokens, on the CPU, which clears the sums.

        Raises:
            KarcherError: If a sum holds NaN or Inf.
        """
        sums = {**self._grams, **self._rows, **self._elements}
        for name, total in sums.items():
            if not bool(total.sum().isfinite()):
                raise KarcherError(
                    f"The inputs of {name} are not finite: repair that model, or leave out the "
                    "examples that it cannot take."
                )

        def means(totals: dict[str, Tensor]) -> dict[str, Tensor]:
            # One at a time, so that the sums in float64 and their copies are never held together.
            names = list(totals)
            return {n: totals.pop(n).div_(tokens).to("cpu", torch.float32) for n in names}

        for total in self._grams.values():
            for matrix in total if total.ndim == 3 else [total]:
                matrix.copy_(matrix.triu().add_(matrix.triu(1).T))
        seen = {*self._first_of, *self._tables}
        unused = {name: width for name, width in self._linear.items() if name not in seen}
        first_of = dict(self._first_of)
        return Measured(
            means(self._grams), first_of, means(self._rows), means(self._elements), unused
        )

    def see(self, function: str, args: tuple[Any, ...]) -> Tensor | None:
        """Note a product that is about to be computed; returns what to take instead, if anything.

        Arguments:
            function: The name of torch's function.
            args: What it was called with.
        """
        place, of_weight = _OPERANDS[function]
        if len(args) <= of_weight:
            return None
        inputs, weight = args[place], args[of_weight]
        if not isinstance(inputs, Tensor) or not isinstance(weight, Tensor):
            return None
        name = self._name_of(weight)
        if name is None and function in _FROM_THE_LEFT and inputs.ndim > 1 and weight.ndim > 1:
            inputs, weight = weight.mT, inputs
            name = self._name_of(weight)
        if name is None:
            return None
        if function == "embedding":
            self._count(name, inputs)
        elif name not in self._tables and inputs.numel():
            self._add_inputs(name, inputs, weight)
        return inputs[..., :1] if name == self._unneeded and function == "linear" else None

    def _name_of(self, weight: Tensor) -> str | None:
        name = self._names.get(id(weight))
        if name is None and not weight.is_meta:
            name = self._stored.get(weight.untyped_storage().data_ptr())
        return name

    def _count(self, name: str, ids: Tensor) -> None:
        rows = len(self._parameters[name])
        counts = torch.bincount(ids.flatten(), minlength=rows).double()
        if ids.ndim < 2 or len(ids) == 1:
            # Positions are looked up once for all examples of a batch.
            counts *= self._examples
        self._rows[name] = self._rows.get(name, 0) + counts

    def _add_inputs(self, name: str, inputs: Tensor, weight: Tensor) -> None:
        parameter, width = self._parameters[name], inputs.shape[-1]
        index = None
        if parameter.ndim == 3 and weight.ndim == 2:
            index = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
        key = (inputs.data_ptr(), inputs.numel(), width, inputs._version, index)
        if name not in self._first_of:
            self._first_of[name] = self._inputs.get(key, (name, inputs))[0]
        self._inputs.setdefault(key, (self._first_of[name], inputs))
        if self._first_of[name] != name:
            return
        experts = parameter.shape[:1] if parameter.ndim == 3 else ()
        if name not in self._grams:
            self._grams[name] = inputs.new_zeros((*experts, width, width), dtype=torch.float64)
        total = self._grams[name] if index is None else self._grams[name][index]
        # A product with all experts at once has one matrix of inputs for each.
        parts = inputs.reshape(*total.shape[:-2], -1, width).float()
        for rows in torch.split(parts, _ROWS, dim=-2):
            _add_upper(total, rows)

    def _norm_hook(self, name: str) -> Any:
        """Sums the squares of what the weight of a norm is multiplied with.

        Whatever a norm computes is linear in its weight, up to a constant: so what one more in the
        weight adds to the output is that, also where 1 + weight is meant.
        """
        weight = self._parameters[name]

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._is_measuring:
                return
            self._is_measuring = True
            more = functional_call(module, {"weight": weight + 1}, args, kwargs)
            self._is_measuring = False
            factor = more.sub_(output)
            if factor.shape[-1] == len(weight):
                for rows in torch.split(factor.float().flatten(0, -2), _ROWS):
                    squares = torch.linalg.vector_norm(rows, dim=0).double().square_()
                    self._elements[name] = self._elements.get(name, 0) + squares

        return hook


class _Watch(TorchFunctionMode):
    """Shows each product with a weight to sums, before torch computes it."""

    def __init__(self, sums: ActivationSums) -> None:
        super().__init__()
        self._sums = sums

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        instead = self._sums.see(name, args) if name in _OPERANDS else None
        return func(*args, **(kwargs or {})) if instead is None else instead


def _add_upper(total: Tensor, rows: Tensor) -> None:
    """total += rows' rows on and above the diagonal; both may have an axis of experts first."""
    for start in range(0, rows.shape[-1], _COLUMNS):
        panel = slice(start, start + _COLUMNS)
        total[..., panel, start:].add_(rows[..., panel].mT @ rows[..., start:])


def _is_norm(module: nn.Module) -> bool:
    weight: Any = module.weight
    return "norm" in type(module).__name__.lower() and weight.ndim == 1


def _widths(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, int]]:
    """The number of inputs of each linear layer."""
    from transformers.pytorch_utils import Conv1D

    for name, module in modules:
        if isinstance(module, nn.Linear):
            yield name, module.in_features
        elif isinstance(module, Conv1D):
            yield name, module.nx


@torch.no_grad()
def activation_metrics(
    model: nn.Module, batches: Iterable[Tensor]
) -> dict[str, InputGram | Tensor]:
    """The metrics of a model's weights from what they are multiplied with, in memory.

    Arguments:
        model: A language model or classifier in float32 and evaluation mode, borrowed; takes
            input_ids. If it has a choice, its experts must be computed one at a time
            (`model.set_experts_implementation("eager")`).
        batches: Tokens, (batch, length) int64, without padding.

    Returns:
        By the names of its parameters, in float32 on the CPU: for a linear layer its `InputGram`,
        of its inputs' mean over all tokens, which layers that share an input share; for stacked
        experts a stack of them, each of the tokens that were routed to it, divided by the number
        of all tokens; for embeddings and norms a diagonal metric of the parameter's shape. What is
        not there (biases, convolutions) has a metric of one, and so has a layer that was not used.

    Raises:
        KarcherError: If an input is not finite.
    """
    parameters = dict(model.named_parameters())
    sums, tokens = ActivationSums(parameters, model.modules()), 0
    for ids in batches:
        with sums.watching(len(ids)):
            model(input_ids=ids.to(next(iter(parameters.values())).device))
        tokens += ids.numel()
    measured = sums.measured(tokens)
    metrics: dict[str, InputGram | Tensor] = {
        name: InputGram(dense=measured.grams[first]) for name, first in measured.first_of.items()
    }
    for name, rows in measured.rows.items():
        metrics[name] = rows[:, None].expand(parameters[name].shape)
    return metrics | measured.elements
