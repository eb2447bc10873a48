"""Metrics on disk, named like the tensors of the checkpoint that they are of."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError

_LOG = logging.getLogger(__name__)

_SCHEMA = "mergekit-karcher/metric/1"
_WRITING = "writing"
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
            f"{reference} is no model that transformers reads ({str(error).splitlines()[0]})."
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
    model, seen = kind.from_pretrained(
        reference,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **place,
    )
    missing = sorted(seen["missing_keys"])
    if missing and not empty:
        raise KarcherError(
            f"{reference} lacks {missing[0]} of a {architecture}: it would be made up at random; "
            "name a model that has all of its weights."
        )
    whole: nn.Module = model.eval()
    return whole


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
    writing = folder / _WRITING
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    save_torch_state_dict(tensors, writing)
    about = {"schema": _SCHEMA, "version": __version__, "model": reference, **about}
    (writing / "metric.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for path in sorted(writing.iterdir(), key=lambda path: path.suffix == ".json"):
        os.replace(path, folder / path.name)
    writing.rmdir()


def _as_in_checkpoint(
    reference: str, model: nn.Module, metric: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    from mergekit.common import ModelReference

    tensors = dict(metric)
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5, parameters are called as in the checkpoint
        pass
    else:
        tensors = revert_weight_conversion(model, tensors)  # type: ignore[arg-type]
    loader = ModelReference.parse(reference).lazy_loader()
    own = set(loader.index.tensor_paths)
    strange = sorted(set(tensors) - own)
    if strange:
        raise KarcherError(
            f"{reference} has no {strange[0]}, which transformers calls a parameter of it: save "
            "the model anew by transformers first."
        )
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    rest = sorted(own - set(tensors) - tied)
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
    # Safetensors wants each in a memory of its own; what was stacked comes back as views.
    return {
        name: tensor if tensor is metric.get(name) else tensor.clone(memory_format=_CONTIGUOUS)
        for name, tensor in tensors.items()
    }
