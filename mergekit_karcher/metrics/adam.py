"""The metric that an Adam optimizer has kept: G = sqrt(v_hat) + eps, parameter by parameter.

Adam divided its steps by G. v_hat, the running mean of squared gradients (`exp_avg_sq`) without the
bias of its start at zero, is of training batches, and so no Fisher information.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.metrics.moments import Moments

# What wrappers of modules put between the parts of a name.
_WRAPPERS = re.compile(r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def adam_metric(checkpoint: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """G of every parameter of the model that was trained, by name: new float32 tensors on the CPU.

    The checkpoint is a folder of the Hugging Face Trainer, its optimizer.pt, or a distributed
    checkpoint of torch that names its parameters. G is zero for a parameter that the optimizer
    never moved. Raises KarcherError if there is no state of Adam or AdamW, if it holds more than
    tensors and numbers, or if it does not fit the model. The model may be on the meta device.
    """
    shapes = _shapes(model)
    moments = dict(_named_moments(checkpoint, model))
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


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _named_moments(checkpoint: Path, model: nn.Module) -> Iterator[tuple[str, Moments]]:
    files = (checkpoint / name for name in ("", "optimizer.pt", "optimizer.bin"))
    file = next((path for path in files if path.is_file()), None)
    if file is not None:
        yield from _moments_of_state(_loaded(file), file, model)
        return
    folders = (checkpoint / name for name in ("", "optimizer_0", "optimizer"))
    folder = next((path for path in folders if (path / ".metadata").is_file()), None)
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
    state: Mapping[str, Any], file: Path, model: nn.Module
) -> Iterator[tuple[str, Moments]]:
    groups, entries = [group for group in state["param_groups"] if group["params"]], state["state"]
    for key, entry in entries.items():
        if "exp_avg_sq" not in entry:
            raise KarcherError(
                f"{file} has {', '.join(sorted(map(str, entry)))} for {key}, but no exp_avg_sq: "
                "only Adam and AdamW of 32 or 16 bits keep the second moments that are needed; "
                "make a metric from data."
            )
    keys = [key for group in groups for key in group["params"]]
    given = [name for group in groups for name in group.get("param_names", ())]
    if len(given) != len(keys) and all(isinstance(key, str) for key in keys):
        given = keys
    if len(given) == len(keys):
        names = {key: _WRAPPERS.sub("", name) for key, name in zip(keys, given, strict=True)}
    else:
        moved = {key: entry["exp_avg_sq"].shape for key, entry in entries.items()}
        names = _proven_names([group["params"] for group in groups], moved, file, model)
    for group in groups:
        for key in group["params"]:
            if key in entries:
                squares, step = entries[key]["exp_avg_sq"], float(entries[key]["step"])
                yield names[key], Moments(squares, step, group["betas"][1], group["eps"])


def _proven_names(
    groups: Sequence[Sequence[int]], moved: Mapping[int, torch.Size], file: Path, model: nn.Module
) -> dict[int, str]:
    """The name of each number, if exactly one of `_groupings` has the shapes of all that moved."""
    shapes = _shapes(model)
    fitting: list[dict[int, str]] = []
    for grouping in _groupings(model):
        if [*map(len, grouping)] == [*map(len, groups)]:
            pairs = list(zip(chain(*groups), chain(*grouping), strict=True))
            fits = all(moved.get(key, shapes[name]) == shapes[name] for key, name in pairs)
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
