"""Plain stacks of layers, as an `nn.Sequential` has them: linear, convolutional, normalising.

They are recognised by names and shapes alone: all layers have one name but for a number in it, and
each reads as many units as the one before has. What lies between layers (activations, pooling,
dropout) works on each unit by itself and does not matter. Skip connections and grouped convolutions
cannot be seen: so the user has to say that there are none, or give a specification.
"""

from __future__ import annotations

import re

from mergekit_karcher.align.symmetry import Move, Shapes, Specification, Symmetry
from mergekit_karcher.errors import KarcherError

_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
_COUNT = "num_batches_tracked"


def specification(shapes: Shapes) -> Specification:
    """The symmetries of a raw checkpoint, one for every hidden layer.

    Raises `KarcherError` if names and shapes are not those of a plain stack of layers.
    """
    symmetries: list[Symmetry] = []
    fixed: list[tuple[str, int]] = []
    # The moves of the last layer, until the layer comes that reads its units.
    waiting: list[Move] = []
    width, name = 0, ""
    # A norm over all units would change if units of zeros were added.
    paddable = True
    for parts in _layers(shapes):
        weight = parts["weight"]
        shape = shapes[weight]
        if len(shape) > 1:
            if waiting:
                if shape[1] % width:
                    raise _no_stack(f"{weight} reads {shape[1]} units, but {name} has {width}")
                # Where an image becomes a vector, the pixels of a channel stand side by side.
                moves = (*waiting, Move(weight, 1, 0, shape[1] // width))
                feeds = (waiting[0].tensor,)
                symmetries.append(Symmetry(name, width, moves, padding=paddable, feeds=feeds))
            else:
                fixed.append((weight, 1))
            fixed += [(weight, axis) for axis in range(2, len(shape))]
            width, name, paddable = shape[0], weight.rpartition(".")[0], True
            waiting = [Move(parts[part], 0) for part in ("weight", "bias") if part in parts]
        elif waiting and shape == (width,):
            if "running_mean" not in parts:
                if len(shapes[waiting[0].tensor]) > 2:
                    raise _no_stack(
                        f"{weight} is a norm without running statistics after a convolution, "
                        "perhaps over groups of channels"
                    )
                paddable = False
            waiting += [Move(parts[part], 0) for part in _NORM_PARTS if part in parts]
        else:
            raise _no_stack(f"{weight} of shape {shape} does not follow {width} units")
    if not symmetries:
        raise _no_stack("there are no two layers")
    fixed += [(move.tensor, move.axis) for move in waiting]
    return Specification("stack", shapes, tuple(symmetries), tuple(fixed))


def assumption(specification: Specification) -> str:
    """What is taken from the names of a stack and cannot be checked, in words for the user."""
    layers = layers_in(specification)
    return (
        "A file of tensors does not say how its layers are connected: by their names, "
        f"{', '.join(layers)} follow one another, and each would read the one before it alone, "
        "without skip connections, gates or groups; add --assume-stack if that is so, or describe "
        "the network (align: --spec), because otherwise the result would compute something else."
    )


def layers_in(specification: Specification) -> list[str]:
    """The names of the layers of a stack, from the first to the last."""
    # The last layer reads the last hidden units, and has no symmetry of its own.
    last = next(m.tensor for m in specification.symmetries[-1].moves if m.axis == 1)
    return [*(s.name for s in specification.symmetries), last.rpartition(".")[0]]


def _layers(shapes: Shapes) -> list[dict[str, str]]:
    """The names of each layer's tensors, by their last part, in the order of the layers."""
    templates: set[str] = set()
    layers: dict[int, dict[str, str]] = {}
    for name in shapes:
        module, _, part = name.rpartition(".")
        match = re.fullmatch(r"(\D*)(\d+)(\D*)", module)
        if match is None or part not in (*_NORM_PARTS, _COUNT):
            raise _no_stack(f"{name} is not the name of one of its tensors")
        templates.add(f"{match[1]}#{match[3]}")
        layers.setdefault(int(match[2]), {})[part] = name
    if len(templates) != 1:
        raise _no_stack(f"its names begin differently ({', '.join(sorted(templates))})")
    for number, parts in layers.items():
        if "weight" not in parts:
            raise _no_stack(f"layer {number} has no weight")
    return [layers[number] for number in sorted(layers)]


def _no_stack(why: str) -> KarcherError:
    return KarcherError(
        f"This raw checkpoint is no plain stack of layers: {why}; give its symmetries by --spec."
    )
