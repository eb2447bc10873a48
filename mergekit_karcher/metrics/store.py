"""Metrics on disk, named like the tensors of the checkpoint that they are of."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from os import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError, first_line

_LOG = logging.getLogger(__name__)

_SCHEMA = "mergekit-karcher/metric/1"
WRITING = "writing"
_CONTIGUOUS = torch.contiguous_format


def load_model(reference: str, *, empty: bool = False) -> nn.Module:
    """A Hugging Face model of the class that its config names, in float32 and evaluation mode.

    empty: without its weights, on the meta device. Raises `KarcherError` for one that is not whole.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(reference)
    except Exception as error:
        raise KarcherError(
            f"{reference} is no model that transformers reads ({first_line(error)})."
        ) from None
    architecture = next(iter(config.architectures or ()), None)
    kind = getattr(transformers, architecture or "", None)
    if kind is None:
        raise KarcherError(
            f"The config of {reference} asks for {architecture}, which this transformers has not: "
            "name a model of a class that it knows."
        )
    place = {"device_map": "meta"} if empty else {}
    # Attention is written out, so that torch.func can take it a batch at a time.
    try:
        model, seen = kind.from_pretrained(
            reference,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **place,
        )
    except Exception as error:
        raise KarcherError(f"{reference} cannot be loaded ({first_line(error)}).") from None
    wrong = sorted(str(own[0]) for own in seen["mismatched_keys"])
    if wrong:
        raise KarcherError(
            f"{wrong[0]} of {reference} has not the shape that its config says: name a model whose "
            "config and weights belong together."
        )
    missing = sorted(seen["missing_keys"])
    if missing and not empty:
        raise KarcherError(
            f"{reference} lacks {missing[0]} of a {architecture}: it would be made up at random; "
            "name a model that has all of its weights."
        )
    whole: nn.Module = model.eval()
    return whole


def check_names(reference: str, model: nn.Module) -> None:
    """Raise now if a metric by the model's parameters could not be named like its checkpoint."""
    empty = {name: p.detach().to("meta") for name, p in model.named_parameters()}
    _as_in_checkpoint(reference, model, empty)


def write_metric(
    folder: Path, reference: str, model: nn.Module, metric: dict[str, torch.Tensor], about: Any
) -> None:
    """Write a metric, by parameter, as safetensors named like the model's checkpoint.

    model: as loaded from it, which knows how transformers renamed and stacked its tensors; any
    weights. Tensors of the checkpoint that are no parameters get zeros. about: what metric.json
    says of it.
    """
    from huggingface_hub import save_torch_state_dict

    tensors = _as_in_checkpoint(reference, model, metric)
    # Under a folder of its own first: what is cut off there is no metric.
    writing = folder / WRITING
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    save_torch_state_dict(tensors, writing)
    about = {"schema": _SCHEMA, "version": __version__, "model": reference, **about}
    (writing / "metric.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for path in sorted(writing.iterdir(), key=lambda path: path.suffix == ".json"):
        replace(path, folder / path.name)
    writing.rmdir()


def _as_in_checkpoint(
    reference: str, model: nn.Module, metric: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    from mergekit.common import ModelReference
    from transformers.core_model_loading import revert_weight_conversion

    tensors = revert_weight_conversion(model, dict(metric))  # type: ignore[arg-type]
    loader = ModelReference.parse(reference).lazy_loader()
    own = set(loader.index.tensor_paths)
    tied = _tied_names(model)
    renamed = {}
    for name, tensor in tensors.items():
        there = next((n for n in _other_names(name, model, tied) if n in own), None)
        if there is None:
            raise KarcherError(
                f"{reference} has no {name}, which transformers calls a parameter of it: save the "
                "model anew by transformers first."
            )
        renamed[there] = tensor
    tensors = renamed
    doubles = {n for name in tied for n in _other_names(name, model, tied)}
    rest = sorted(own - set(tensors) - doubles)
    unknown = []
    for name in rest:
        tensor = loader.get_tensor(name)
        if tensor.is_floating_point():
            tensors[name] = torch.zeros(tensor.shape)
            unknown.append(name)
    if unknown:
        _LOG.warning(
            "%d tensors of %s are no parameters of the model (%s is the first): their metric is "
            "zero.",
            len(unknown),
            reference,
            unknown[0],
        )
    given = {id(tensor) for tensor in metric.values()}
    # Safetensors wants each in a memory of its own; what was stacked comes back as views.
    return {
        name: tensor if id(tensor) in given else tensor.clone(memory_format=_CONTIGUOUS)
        for name, tensor in tensors.items()
    }


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter that has more than one, by each of them."""
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_parameter.setdefault(id(parameter), []).append(name)
    return {name: names for names in by_parameter.values() if len(names) > 1 for name in names}


def _other_names(name: str, model: nn.Module, tied: Mapping[str, list[str]]) -> list[str]:
    """What a checkpoint may call a parameter: it may leave out, or add, the name of the trunk."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = [name, *tied.get(name, ())]
    return [*names, *(n.removeprefix(prefix) for n in names), *(f"{prefix}{n}" for n in names)]
