"""Metrics on disk, whose tensors have the names that the model's checkpoint gives them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import replacing, write_text
from mergekit_karcher.host.activation_metrics import SCHEMA
from mergekit_karcher.host.checkpoints import open_checkpoint

_LOG = logging.getLogger(__name__)


def check_names(reference: str, model: nn.Module) -> None:
    """Raise KarcherError if the checkpoint has no tensor for one of the model's parameters.

    The metric of such a model could not be written, so this comes before it is made.
    """
    empty = {name: p.detach().to("meta") for name, p in model.named_parameters()}
    _as_in_checkpoint(reference, model, empty)


def write_metric(
    folder: Path,
    reference: str,
    model: nn.Module,
    metric: Mapping[str, torch.Tensor],
    about: Mapping[str, Any],
) -> None:
    """Write a metric as safetensors with the names and shapes of the model's checkpoint.

    The metric is a float32 tensor on the CPU for each parameter, by name, borrowed; tensors of the
    checkpoint that are no parameters get zeros. The model, with or without weights, knows how
    transformers has renamed and stacked the tensors. metric.json, which says `about`, comes last: a
    folder that has it is a whole metric. Raises KarcherError as `check_names` does, and OSError.
    """
    tensors = _as_in_checkpoint(reference, model, metric)
    folder.mkdir(parents=True, exist_ok=True)
    shards = split_torch_state_dict_into_shards(tensors)
    for filename, names in shards.filename_to_tensors.items():
        with replacing(folder / filename) as partial:
            save_file({name: tensors[name] for name in names}, partial, {"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2))
    about = {"schema": SCHEMA, "version": __version__, "model": reference, **about}
    write_text(folder / "metric.json", json.dumps(about, indent=1) + "\n")


def _as_in_checkpoint(
    reference: str, model: nn.Module, metric: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A metric by the names of the checkpoint, each tensor contiguous and in memory of its own."""
    from transformers.core_model_loading import revert_weight_conversion

    checkpoint = open_checkpoint(reference)
    stored = set(checkpoint.index.tensor_paths)
    tied, given = tied_names(model), {id(tensor) for tensor in metric.values()}
    tensors = {}
    for name, tensor in revert_weight_conversion(model, dict(metric)).items():  # type: ignore[arg-type]
        stored_names = [n for n in names_in_checkpoint(name, model, tied) if n in stored]
        if not stored_names:
            raise KarcherError(
                f"{reference} has no {name}, which transformers calls a parameter of it: save the "
                "model anew by transformers first."
            )
        if id(tensor) not in given:
            # What was stacked comes back as views of one memory, which safetensors does not write.
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        tensors[stored_names[0]] = tensor.contiguous()
    copies = {n for name in tied for n in names_in_checkpoint(name, model, tied)}
    others = {
        name: torch.zeros(tensor.shape)
        for name in sorted(stored - set(tensors) - copies)
        if (tensor := checkpoint.loader.get_tensor(name)).is_floating_point()
    }
    if others:
        _LOG.warning(
            "%d tensors of %s are no parameters of the model (%s is the first): their metric is "
            "zero.",
            len(others),
            reference,
            next(iter(others)),
        )
    return tensors | others


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter that has more than one, by each of them."""
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_parameter.setdefault(id(parameter), []).append(name)
    return {name: names for names in by_parameter.values() if len(names) > 1 for name in names}


def names_in_checkpoint(name: str, model: nn.Module, tied: Mapping[str, list[str]]) -> list[str]:
    """What a checkpoint may call a parameter: it may leave out, or add, the name of the trunk."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = [name, *tied.get(name, ())]
    return [*names, *(n.removeprefix(prefix) for n in names), *(f"{prefix}{n}" for n in names)]
