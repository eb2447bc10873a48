"""The metric that an Adam optimizer has kept: G = sqrt(v_hat) + eps, parameter by parameter.

v is Adam's running mean of squared gradients (`exp_avg_sq`), v_hat is v without the bias of its
start at zero. The gradients are those of training batches, so v is no Fisher information; G is what
Adam divided its steps by.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.metrics.moments import Moments

_FILES = ("optimizer.pt", "optimizer.bin")
# Where torch.distributed puts an optimizer, and the file by which its folders are known.
_DISTRIBUTED, _DISTRIBUTED_METADATA = ("", "optimizer_0", "optimizer"), ".metadata"

# What wrappers of modules put between the parts of a name.
_WRAPPERS = re.compile(r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def adam_metric(checkpoint: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Read G of every parameter from a checkpoint that holds Adam's or AdamW's state.

    Arguments:
        checkpoint: A folder of the Hugging Face Trainer, its optimizer.pt, or a distributed
            checkpoint of torch that names its parameters.
        model: Of the class that was trained, on any device, the meta device too.

    Returns:
        A new float32 tensor on the CPU for each parameter, by its name in the model: G, or zeros
        for a parameter that the optimizer never moved.

    Raises:
        KarcherError: If there is no state of Adam, if it holds more than tensors and numbers, or if
            it does not fit the model. A state that numbers its parameters must fit exactly one of
            the orders in which the Trainer or a plain optimizer would have numbered them.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    moments = dict(_named_moments(checkpoint, model, shapes))
    if not moments:
        raise KarcherError(
            f"{checkpoint} has no moments of any parameter: it was saved before the first step, or "
            "is not Adam's."
        )
    for name, entry in moments.items():
        if name not in shapes:
            hint = (
                "it was saved without names; save it by torch's get_optimizer_state_dict"
                if name.isdigit()
                else "name the model that was trained"
            )
            raise KarcherError(
                f"{checkpoint} has moments of {name}, which is no parameter of the model: {hint}."
            )
        if entry.squares.shape != shapes[name]:
            raise KarcherError(
                f"The moments of {name} in {checkpoint} have shape {tuple(entry.squares.shape)}, "
                f"but the model's parameter {tuple(shapes[name])}: name the model that was "
                "trained, and save the optimizer's state unsharded or with names."
            )
    return {
        name: moments[name].metric() if name in moments else torch.zeros(shape)
        for name, shape in shapes.items()
    }


def _named_moments(
    checkpoint: Path, model: nn.Module, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Moments]]:
    files = [checkpoint, *(checkpoint / name for name in _FILES)]
    file = next((path for path in files if path.is_file()), None)
    if file is not None:
        yield from _moments_of_state(_loaded(file), file, model, shapes)
        return
    folders = (checkpoint / name for name in _DISTRIBUTED)
    folder = next((path for path in folders if (path / _DISTRIBUTED_METADATA).is_file()), None)
    if folder is None:
        deepspeed = checkpoint.is_dir() and any(checkpoint.glob("global_step*"))
        hint = " (what DeepSpeed saves is not read)" if deepspeed else ""
        raise KarcherError(
            f"{checkpoint} holds no optimizer state{hint}: give a checkpoint folder of the "
            "Hugging Face Trainer with its optimizer.pt, or a distributed checkpoint of torch."
        )
    from mergekit_karcher.metrics.distributed import distributed_moments

    for name, entry in distributed_moments(folder):
        yield _WRAPPERS.sub("", name), entry


def _loaded(file: Path) -> Mapping[str, Any]:
    try:
        # Only files of the present format can be mapped.
        mapped = zipfile.is_zipfile(file)
        state = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:
        raise KarcherError(
            f"{file} cannot be read ({first_line(error)}): give the optimizer.pt of the Hugging "
            "Face Trainer."
        ) from None
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise KarcherError(f"{file} is not the state of an optimizer of torch.")
    return state


def _moments_of_state(
    state: Mapping[str, Any], file: Path, model: nn.Module, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Moments]]:
    groups = [group for group in state["param_groups"] if group["params"]]
    entries = state["state"]
    for key, entry in entries.items():
        if "exp_avg_sq" not in entry:
            raise KarcherError(
                f"{file} has {', '.join(sorted(map(str, entry)))} for {key}, but no exp_avg_sq: "
                "only Adam and AdamW of 32 or 16 bits keep the second moments that are needed; "
                "make a metric from data."
            )
    names = _given_names(groups)
    if names is None:
        moved = {key: entry["exp_avg_sq"].shape for key, entry in entries.items()}
        names = _proven_names([group["params"] for group in groups], moved, file, model, shapes)
    for group in groups:
        for key in group["params"]:
            if key in entries:
                squares, step = entries[key]["exp_avg_sq"], float(entries[key]["step"])
                yield names[key], Moments(squares, step, group["betas"][1], group["eps"])


def _given_names(groups: Sequence[Mapping[str, Any]]) -> dict[Any, str] | None:
    """The name of each key of a state, where it has been saved with names."""
    keys = [key for group in groups for key in group["params"]]
    names = [name for group in groups for name in group.get("param_names", ())]
    if len(names) != len(keys):
        if not all(isinstance(key, str) for key in keys):
            return None
        names = keys
    return {key: _WRAPPERS.sub("", name) for key, name in zip(keys, names, strict=True)}


def _proven_names(
    groups: Sequence[Sequence[int]],
    moved: Mapping[int, torch.Size],
    file: Path,
    model: nn.Module,
    shapes: Mapping[str, torch.Size],
) -> dict[int, str]:
    """The name of each number, if one way of grouping the parameters fits, and one only.

    moved: the shape of each parameter that has moments.
    """
    fitting: list[dict[int, str]] = []
    for grouping in _groupings(model):
        if [len(names) for names in grouping] != [len(keys) for keys in groups]:
            continue
        pairs = [
            pair
            for keys, names in zip(groups, grouping, strict=True)
            for pair in zip(keys, names, strict=True)
        ]
        fits = all(key not in moved or moved[key] == shapes[name] for key, name in pairs)
        if fits and dict(pairs) not in fitting:
            fitting.append(dict(pairs))
    if len(fitting) != 1:
        sizes = " and ".join(str(len(keys)) for keys in groups)
        why = "more than one way of naming them fits" if fitting else "no way of naming them fits"
        raise KarcherError(
            f"{file} numbers its {sizes} parameters instead of naming them, and {why} the "
            f"{len(shapes)} of this model by their shapes: name the model that was trained, or "
            "make a metric from data."
        )
    return fitting[0]


def _groupings(model: nn.Module) -> Iterator[list[list[str]]]:
    """How the Trainer, old and new, and a plain optimizer put parameters in groups."""
    from transformers import Trainer
    from transformers.trainer_pt_utils import get_parameter_names

    names = [name for name, _ in model.named_parameters()]
    decayed_now = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    no_norms: list[str] = get_parameter_names(model, [nn.LayerNorm])  # type: ignore[no-untyped-call]
    decayed_before = {name for name in no_norms if "bias" not in name}
    for decayed in (decayed_now, decayed_before, set(names)):
        parts = ([n for n in names if n in decayed], [n for n in names if n not in decayed])
        yield [part for part in parts if part]
