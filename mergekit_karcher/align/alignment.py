"""alignment.json: the orders that an alignment found, which a later run can apply again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_karcher.align.orders import Orders
from mergekit_karcher.align.symmetry import Specification
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import write_text

SCHEMA = "mergekit-karcher/alignment/1"


class Alignment(BaseModel):
    """Which index comes to each place, for every model and every axis that is permuted.

    specification: a digest of the symmetries that the orders are for.
    reference: the model that all others were matched to; null where they were matched jointly.
    orders: all orders, each once.
    models: for each model the axes that are permuted, as "tensor:axis", with the number of their
        order in orders.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: str = Field(SCHEMA, alias="schema", pattern=f"^{SCHEMA}$")
    family: str
    specification: str
    reference: str | None
    orders: list[list[int]]
    models: dict[str, dict[str, int]]

    def check(self, specification: Specification) -> None:
        """Raise `KarcherError` unless the orders are for models with those symmetries."""
        if self.specification != _digest_of(specification):
            raise KarcherError(
                "The alignment was made for models with other symmetries than these: align these "
                "anew."
            )

    def orders_of(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Orders:
        """The orders of one model.

        Arguments:
            name: The model.
            shapes: Of its tensors.

        Returns:
            New tensors, each a permutation of the indices of its axis.

        Raises:
            KarcherError: If the model is not in the alignment, or an order does not fit its tensor.
        """
        if name not in self.models:
            raise KarcherError(
                f"The alignment knows no model {name}, only {', '.join(self.models)}: give the "
                "models that it was made for."
            )
        orders: Orders = {}
        for key, number in self.models[name].items():
            tensor, _, axis = key.rpartition(":")
            order = torch.tensor(self.orders[number] if number < len(self.orders) else [])
            length = shapes[tensor][int(axis)] if tensor in shapes else None
            if (
                length is None
                or len(order) != length
                or not torch.equal(order.sort().values, torch.arange(length))
            ):
                raise KarcherError(
                    f"The alignment does not fit {name}: it has no permutation of axis {axis} of "
                    f"{tensor}; align the models anew."
                )
            orders[tensor, int(axis)] = order
        return orders


def alignment_of(
    specification: Specification,
    reference: str | None,
    names: Sequence[str],
    orders: Sequence[Orders],
) -> Alignment:
    """The alignment with the given orders.

    Arguments:
        specification: The symmetries that the orders are for.
        reference: The model that all others were matched to; None where they were matched jointly.
        names, orders: Each model and its orders; equal orders are kept once.
    """
    numbers: dict[bytes, int] = {}
    lists: list[list[int]] = []
    models: dict[str, dict[str, int]] = {}
    for name, orders_of_model in zip(names, orders, strict=True):
        models[name] = {}
        for (tensor, axis), order in orders_of_model.items():
            values = order.numpy().astype(np.int64)
            if values.tobytes() not in numbers:
                numbers[values.tobytes()] = len(lists)
                lists.append(values.tolist())
            models[name][f"{tensor}:{axis}"] = numbers[values.tobytes()]
    return Alignment(
        schema=SCHEMA,
        family=specification.family,
        specification=_digest_of(specification),
        reference=reference,
        orders=lists,
        models=models,
    )


def write(alignment: Alignment, path: Path) -> None:
    """Write an alignment to a file, whole or not at all."""
    write_text(path, alignment.model_dump_json(by_alias=True) + "\n")


def read(path: Path) -> Alignment:
    """Read an alignment from a file; raises `KarcherError` for anything else."""
    try:
        return Alignment.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        raise KarcherError(
            f"{path} is not an alignment of the kind {SCHEMA}: give a file that align wrote."
        ) from None


def _digest_of(specification: Specification) -> str:
    """Equal for equal symmetries."""
    text = repr((specification.family, specification.symmetries))
    return hashlib.sha256(text.encode()).hexdigest()
