"""The symmetries of every known family of networks, one module a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mergekit_karcher.align.families import bert, gpt2, llama, neox, stack
from mergekit_karcher.align.symmetry import Shapes, Specification
from mergekit_karcher.errors import KarcherError

Family = Callable[[Mapping[str, Any], Shapes, bool], Specification]

BY_MODEL_TYPE: dict[str, Family] = {
    **dict.fromkeys(llama.MODEL_TYPES, llama.specification),
    **dict.fromkeys(gpt2.MODEL_TYPES, gpt2.specification),
    **dict.fromkeys(neox.MODEL_TYPES, neox.specification),
    **dict.fromkeys(bert.MODEL_TYPES, bert.specification),
}


def specification_for(
    config: Mapping[str, Any] | None, shapes: Shapes, residual: bool
) -> Specification:
    """The symmetries of a model.

    Arguments:
        config: That of a Hugging Face model; None for a raw checkpoint, see `families.stack`.
        shapes: Of its tensors.
        residual: Whether the residual stream is permuted as well; a raw checkpoint has none.

    Raises:
        KarcherError: If the family is not known, or the weights are not as the family has them.
        KeyError: If the config or the weights lack something that all models of the family have.
    """
    if config is None:
        return stack.specification(shapes)
    model_type = str(config.get("model_type"))
    family = BY_MODEL_TYPE.get(model_type)
    if family is None:
        raise KarcherError(
            f"The symmetries of models of type {model_type} are not known: give them by --spec "
            f"(known are {', '.join(sorted(BY_MODEL_TYPE))})."
        )
    specification = family(config, shapes, residual)
    if not any(symmetry.padding for symmetry in specification.symmetries):
        raise KarcherError(
            f"No layer of the type {model_type} is among the weights; quantised models must be "
            "dequantised first."
        )
    return specification
