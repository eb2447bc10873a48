"""alignment.json: the orders that an alignment found, for a second run to apply again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_karcher.align.match import Orders
from mergekit_karcher.align.symmetry import Specification
from mergekit_karcher.errors import KarcherError

SCHEMA = "mergekit-karcher/alignment/1"


class Alignment(BaseModel):
    """Which index comes to each place.

    specification: a digest of the symmetries that they belong to. models: for each model the axes
    that move, as "tensor:axis", with the number of their order in orders. reference: the model that
    all were matched to; null where they were matched jointly.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: str = Field(SCHEMA, alias="schema", pattern=f"^{SCHEMA}$")
    family: str
    specification: str
    reference: str | None
    orders: list[list[int]]
    models: dict[str, dict[str, int]]

    def check(self, specification: Specification) -> None:
        """Raise unless the orders were found for those symmetries."""
        if self.specification != digest_of(specification):
            raise KarcherError(
                "The alignment was found for models with other symmetries than these: align anew."
            )

    def of(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Orders:
        """The orders of one model, checked against the shapes of its tensors."""
        if name not in self.models:
            raise KarcherError(
                f"The alignment knows no model {name}, only {', '.join(self.models)}."
            )
        found: Orders = {}
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
                    f"The alignment does not fit {name}: it is no order of axis {axis} of {tensor}."
                )
            found[tensor, int(axis)] = order
        return found


def digest_of(specification: Specification) -> str:
    """Equal for equal symmetries."""
    text = repr((specification.family, specification.symmetries))
    return hashlib.sha256(text.encode()).hexdigest()


def alignment_of(
    specification: Specification,
    reference: str | None,
    names: Sequence[str],
    orders: Sequence[Orders],
) -> Alignment:
    """From the orders of each model; equal ones are kept once."""
    kept: dict[bytes, int] = {}
    lists: list[list[int]] = []
    models: dict[str, dict[str, int]] = {}
    for name, own in zip(names, orders, strict=True):
        models[name] = {}
        for (tensor, axis), order in own.items():
            values = order.numpy().astype(np.int64)
            if values.tobytes() not in kept:
                kept[values.tobytes()] = len(lists)
                lists.append(values.tolist())
            models[name][f"{tensor}:{axis}"] = kept[values.tobytes()]
    return Alignment(
        schema=SCHEMA,
        family=specification.family,
        specification=digest_of(specification),
        reference=reference,
        orders=lists,
        models=models,
    )


def write(alignment: Alignment, path: Path) -> None:
    """Write it whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(alignment.model_dump_json(by_alias=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read(path: Path) -> Alignment:
    """Read one; raises `KarcherError` for anything else."""
    try:
        return Alignment.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        raise KarcherError(f"{path} is not an alignment of the kind {SCHEMA}.") from None
