"""alignment.json: the orders that an alignment found, which a later run can apply again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_karcher.align.orders import Orders
from mergekit_karcher.align.symmetry import Specification
from mergekit_karcher.errors import KarcherError

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

    def orders_of(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Orders:
        """The orders of one model, whose tensors have those shapes; new tensors.

        Raises `KarcherError` if the alignment lacks the model, or an order does not fit its tensor.
        """
        if name not in self.models:
            raise KarcherError(
                f"The alignment knows no model {name}, only {', '.join(self.models)}: give the "
                "models that it was made for."
            )
        orders: Orders = {}
        for key, number in self.models[name].items():
            tensor, _, axis = key.rpartition(":")
            order = self.orders[number] if number < len(self.orders) else []
            places = range(shapes[tensor][int(axis)]) if tensor in shapes else None
            if places is None or sorted(order) != list(places):
                raise KarcherError(
                    f"The alignment does not fit {name}: it has no permutation of axis {axis} of "
                    f"{tensor}; align the models anew."
                )
            orders[tensor, int(axis)] = torch.tensor(order)
        return orders


def alignment_of(
    specification: Specification,
    reference: str | None,
    names: Sequence[str],
    orders: Sequence[Orders],
) -> Alignment:
    """The alignment with the given orders of each model; equal orders are kept once."""
    numbers: dict[tuple[int, ...], int] = {}
    models = {
        name: {
            f"{tensor}:{axis}": numbers.setdefault(tuple(order.tolist()), len(numbers))
            for (tensor, axis), order in orders_of_model.items()
        }
        for name, orders_of_model in zip(names, orders, strict=True)
    }
    return Alignment(
        schema=SCHEMA,
        family=specification.family,
        specification=_digest_of(specification),
        reference=reference,
        orders=[list(order) for order in numbers],
        models=models,
    )


def read(path: Path, specification: Specification) -> Alignment:
    """Read the alignment of models with those symmetries; raises `KarcherError` if it is none."""
    try:
        alignment = Alignment.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        raise KarcherError(
            f"{path} is not an alignment of the kind {SCHEMA}: give a file that align wrote."
        ) from None
    if alignment.specification != _digest_of(specification):
        raise KarcherError(
            "The alignment was made for models with other symmetries than these: align these anew."
        )
    return alignment


def _digest_of(specification: Specification) -> str:
    """Equal for equal symmetries."""
    text = repr((specification.family, specification.symmetries))
    return hashlib.sha256(text.encode()).hexdigest()
