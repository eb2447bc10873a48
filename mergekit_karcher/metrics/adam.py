"""The metric that an Adam optimizer has kept: G = sqrt(v_hat) + eps, parameter by parameter.

v is its running mean of squared gradients (`exp_avg_sq`), v_hat = v / (1 - beta2^step) what it is
without the bias of its start at zero (Kingma & Ba 2015, algorithm 1). The gradients are those of
batches as they were trained on, so v is no Fisher information; G is what the step divided by.
"""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mergekit_karcher.errors import KarcherError, first_line

_FILES = ("optimizer.pt", "optimizer.bin")
_DISTRIBUTED = ("", "optimizer_0", "optimizer")

# What wrappers of modules put between the parts of a name.
_WRAPPERS = re.compile(r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_MOMENT = re.compile(r"(?:.*?\.)?state\.(.+)\.exp_avg_sq")


class Moments(NamedTuple):
    """What Adam knows of one parameter: v, of its shape, and what corrects and bounds it."""

    squares: torch.Tensor
    step: float
    beta2: float
    eps: float

    def metric(self) -> torch.Tensor:
        """G, as a new float32 tensor."""
        if self.beta2 > 0 and self.step > 0:
            seen = -math.expm1(self.step * math.log(self.beta2))
        else:
            seen = 1.0
        unbiased = self.squares.double() / seen
        return unbiased.sqrt_().add_(self.eps).float()


def adam_metric(checkpoint: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """G of every parameter, in float32, zero for one that the optimizer never moved.

    checkpoint: a folder of the Hugging Face Trainer, its optimizer.pt, or a distributed checkpoint
    of torch with names. model: of the class that was trained, on any device, meta too.
    Raises `KarcherError` unless every moment has a name, or the shapes of all of them fit one order
    of the parameters that the Trainer or a plain optimizer would have given them, and one only.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = dict(_named(checkpoint, model, shapes))
    if not found:
        raise KarcherError(
            f"{checkpoint} has no moments of any parameter: it was saved before the first step, or "
            "is not Adam's."
        )
    for name, moments in found.items():
        if name not in shapes:
            hint = (
                "it was saved without names; save it by torch's get_optimizer_state_dict"
                if name.isdigit()
                else "name the model that was trained"
            )
            raise KarcherError(
                f"{checkpoint} has moments of {name}, which the model has not: {hint}."
            )
        if moments.squares.shape != shapes[name]:
            raise KarcherError(
                f"The moments of {name} in {checkpoint} have shape {tuple(moments.squares.shape)}, "
                f"but the model's parameter {tuple(shapes[name])}: name the model that was "
                "trained, and save the optimizer's state unsharded or with names."
            )
    return {
        name: found[name].metric() if name in found else torch.zeros(shape)
        for name, shape in shapes.items()
    }


def _named(
    checkpoint: Path, model: nn.Module, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Moments]]:
    folders = [checkpoint / name for name in _DISTRIBUTED]
    file = next((p for name in _FILES if (p := checkpoint / name).is_file()), None)
    if checkpoint.is_file():
        file = checkpoint
    folder = next((folder for folder in folders if (folder / ".metadata").is_file()), None)
    if file is not None:
        yield from _of_state(_loaded(file), file, model, shapes)
    elif folder is not None:
        yield from _distributed(folder)
    else:
        deepspeed = next(checkpoint.glob("global_step*"), None) if checkpoint.is_dir() else None
        hint = " (what DeepSpeed saves is not read)" if deepspeed is not None else ""
        raise KarcherError(
            f"{checkpoint} holds no optimizer state{hint}: give a checkpoint folder of the "
            "Hugging Face Trainer with its optimizer.pt, or a distributed checkpoint of torch."
        )


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


def _of_state(
    state: Mapping[str, Any], file: Path, model: nn.Module, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Moments]]:
    groups = [group for group in state["param_groups"] if group["params"]]
    keys = [key for group in groups for key in group["params"]]
    for key, entry in state["state"].items():
        if "exp_avg_sq" not in entry:
            raise KarcherError(
                f"{file} has {', '.join(sorted(map(str, entry)))} for {key}, but no exp_avg_sq: "
                "only Adam and AdamW of 32 or 16 bits keep the second moments that are needed; "
                "make a metric from data."
            )
    given = [name for group in groups for name in group.get("param_names", ())]
    if len(given) == len(keys) or all(isinstance(key, str) for key in keys):
        named = zip(keys, given if len(given) == len(keys) else keys, strict=True)
        names = {key: _WRAPPERS.sub("", name) for key, name in named}
    else:
        seen = {key: entry["exp_avg_sq"].shape for key, entry in state["state"].items()}
        names = _proven_names([group["params"] for group in groups], seen, file, model, shapes)
    for group in groups:
        for key in group["params"]:
            if key in state["state"]:
                entry = state["state"][key]
                yield (
                    names[key],
                    Moments(
                        entry["exp_avg_sq"], float(entry["step"]), group["betas"][1], group["eps"]
                    ),
                )


def _proven_names(
    groups: Sequence[Sequence[int]],
    seen: Mapping[int, torch.Size],
    file: Path,
    model: nn.Module,
    shapes: Mapping[str, torch.Size],
) -> dict[int, str]:
    """The name of each number, if one way of grouping the parameters fits, and one only."""
    fitting: list[dict[int, str]] = []
    for grouped in _groupings(model):
        if [len(names) for names in grouped] != [len(keys) for keys in groups]:
            continue
        pairs = [
            pair
            for keys, names in zip(groups, grouped, strict=True)
            for pair in zip(keys, names, strict=True)
        ]
        fits = all(key not in seen or seen[key] == shapes[name] for key, name in pairs)
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
    present = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    outside: list[str] = get_parameter_names(model, [nn.LayerNorm])  # type: ignore[no-untyped-call]
    earlier = {name for name in outside if "bias" not in name}
    for decayed in (present, earlier, set(names)):
        parts = ([n for n in names if n in decayed], [n for n in names if n not in decayed])
        yield [part for part in parts if part]


def _distributed(folder: Path) -> Iterator[tuple[str, Moments]]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    entries = FileSystemReader(folder).read_metadata().state_dict_metadata

    def read(keys: Sequence[str]) -> dict[str, Any]:
        wanted: dict[str, Any] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            if isinstance(entry := entries[key], TensorStorageMetadata)
            else None
            for key in keys
        }
        with warnings.catch_warnings():
            # About the process group that one process has not.
            warnings.simplefilter("ignore")
            load(wanted, checkpoint_id=folder, no_dist=True)
        return wanted

    moments = {key: match[1] for key in entries if (match := _MOMENT.fullmatch(key))}
    if not moments:
        raise KarcherError(
            f"{folder} has no exp_avg_sq of a named parameter: only checkpoints of Adam and AdamW "
            "keep the second moments that are needed."
        )
    settings = [key for key in entries if re.search(r"param_groups\..*\.(betas|eps)$", key)]
    values = read(settings)
    beta2 = {value[1] for key, value in values.items() if key.endswith(".betas")}
    eps = {value for key, value in values.items() if key.endswith(".eps")}
    if len(beta2) != 1 or len(eps) != 1:
        raise KarcherError(
            f"{folder} says {len(beta2)} values of beta2 and {len(eps)} of eps: one of each is "
            "needed; save the optimizer's param_groups with its state."
        )
    for key, name in moments.items():
        step = key.removesuffix("exp_avg_sq") + "step"
        if step not in entries:
            raise KarcherError(f"{folder} does not say the step of {name}.")
        own = read([key, step])
        yield (
            _WRAPPERS.sub("", name),
            Moments(own[key], float(own[step]), float(*beta2), float(*eps)),
        )
