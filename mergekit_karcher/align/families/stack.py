"""Plain stacks of layers, as an `nn.Sequential` has them: linear, convolutional, normalising.

They are recognised by names and shapes alone: all layers have one name but for a number in it, and
each reads as many units as the one before has. What lies between layers (activations, pooling,
dropout) works on each unit by itself and does not matter. Skip connections and grouped convolutions
cannot be seen: networks that have them need a specification.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from mergekit_karcher.align.symmetry import Move, Shapes, Specification, Symmetry
from mergekit_karcher.errors import KarcherError

_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
_COUNT = "num_batches_tracked"


class _Layer(NamedTuple):
    """One module of the stack: a number, and its tensors by the last part of their names."""

    number: int
    parts: dict[str, str]


def specification(shapes: Shapes) -> Specification:
    """The symmetries of a stack: one for every hidden layer.

    Arguments:
        shapes: Of the tensors of a raw checkpoint.

    Raises:
        KarcherError: If names and shapes are not those of a plain stack of layers.
    """
    symmetries: list[Symmetry] = []
    fixed: list[tuple[str, int]] = []
    # The moves of the last layer, until the layer comes that reads its units.
    waiting: list[Move] = []
    width = 0
    first = ""
    # A norm over all units would change if units of zeros were added.
    paddable = True
    for layer in _layers(shapes):
        parts = layer.parts
        shape = shapes[parts["weight"]]
        if len(shape) > 1:
            weight = parts["weight"]
            if waiting:
                if shape[1] % width:
                    raise _no_stack(f"{weight} reads {shape[1]} units, but {first} has {width}")
                # Where an image becomes a vector, the pixels of a channel stand side by side.
                waiting.append(Move(weight, 1, 0, shape[1] // width))
                symmetries.append(
                    Symmetry(
                        first, width, tuple(waiting), padding=paddable, feeds=(waiting[0].tensor,)
                    )
                )
            else:
                fixed.append((weight, 1))
            fixed += [(weight, axis) for axis in range(2, len(shape))]
            paddable = True
            width, first = shape[0], weight.rpartition(".")[0]
            waiting = [Move(weight, 0)]
            if "bias" in parts:
                waiting.append(Move(parts["bias"], 0))
        elif waiting and shape == (width,):
            if "running_mean" not in parts:
                if len(shapes[waiting[0].tensor]) > 2:
                    raise _no_stack(
                        f"{parts['weight']} is a norm without running statistics after a "
                        "convolution, perhaps over groups of channels"
                    )
                paddable = False
            waiting += [Move(parts[part], 0) for part in _NORM_PARTS if part in parts]
        else:
            raise _no_stack(f"{parts['weight']} of shape {shape} does not follow {width} units")
    if not symmetries:
        raise _no_stack("there are no two layers")
    fixed += [(move.tensor, move.axis) for move in waiting]
    return Specification("stack", shapes, tuple(symmetries), tuple(fixed))


def _layers(shapes: Shapes) -> list[_Layer]:
    templates: set[str] = set()
    layers: dict[int, _Layer] = {}
    for name in shapes:
        module, _, part = name.rpartition(".")
        match = re.fullmatch(r"(\D*)(\d+)(\D*)", module)
        if match is None or part not in (*_NORM_PARTS, _COUNT):
            raise _no_stack(f"{name} is not the name of one of its tensors")
        templates.add(f"{match[1]}#{match[3]}")
        number = int(match[2])
        layers.setdefault(number, _Layer(number, {})).parts[part] = name
    if len(templates) != 1:
        raise _no_stack(f"its names begin differently ({', '.join(sorted(templates))})")
    for layer in layers.values():
        if "weight" not in layer.parts:
            raise _no_stack(f"layer {layer.number} has no weight")
    return [layers[number] for number in sorted(layers)]


def _no_stack(why: str) -> KarcherError:
    return KarcherError(
        f"This raw checkpoint is no plain stack of layers: {why}; give its symmetries by --spec."
    )
