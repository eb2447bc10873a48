"""The symmetries of every known family of networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from mergekit_karcher.align.families import classic, llama, stack
from mergekit_karcher.align.symmetry import Shapes, Specification
from mergekit_karcher.errors import KarcherError

Family = Callable[[Mapping[str, Any], Shapes, bool], Specification]

BY_MODEL_TYPE: dict[str, Family] = {
    **dict.fromkeys(llama.MODEL_TYPES, llama.specification),
    "gpt2": classic.gpt2,
    "gpt_neox": classic.gpt_neox,
    "bert": classic.bert,
}


def specification_for(
    config: Mapping[str, Any] | None, shapes: Shapes, residual: bool, assume_stack: bool = False
) -> Specification:
    """The symmetries of a Hugging Face model, or without config of a raw checkpoint.

    residual: whether the residual stream is permuted as well; a raw checkpoint has none.
    assume_stack: whether the user says that a raw checkpoint is what its names suggest.
    Raises `KarcherError` if the family is not known or the weights are not as it has them, and
    `KeyError` if the config or the weights lack something that all models of the family have.
    """
    if config is None:
        found = stack.specification(shapes)
        if not assume_stack:
            raise KarcherError(stack.assumption(found))
        return found
    model_type = str(config.get("model_type"))
    if model_type not in BY_MODEL_TYPE:
        raise KarcherError(
            f"The symmetries of models of type {model_type} are not known: give them by --spec "
            f"(known are {', '.join(sorted(BY_MODEL_TYPE))})."
        )
    for architecture in config.get("architectures") or () if residual else ():
        if re.fullmatch(r".*(?<!LMHead)(?<!DoubleHeads)Model", architecture):
            raise KarcherError(
                f"--residual would reorder what a {architecture} returns, since no head stands on "
                "it: leave --residual out."
            )
    specification = BY_MODEL_TYPE[model_type](config, shapes, residual)
    if all(symmetry.name == "residual" for symmetry in specification.symmetries):
        raise KarcherError(
            f"No layer of the type {model_type} is among the weights; quantised models must be "
            "dequantised first."
        )
    return specification
