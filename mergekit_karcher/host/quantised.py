"""Quantised checkpoints: read as what they stand for where that is plain, refused elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.headers import FLOATS, Header, headers_of

# What quantisers put beside a weight; the first group's weights may be multiplied by it.
_SCALES = ("_scale_inv", "_scale")
_COMPANION = re.compile(
    r"(\.(SCB|absmax|nested_absmax|quant_map|qweight|qzeros|g_idx|weight_packed|weight_shape|W_q"
    r"|_data)|quant_state\.\w+)$"
)
# Those whose names a network's parameters may have as well, which are of floating-point numbers.
_COMPANION_OR_PARAMETER = re.compile(r"(_zero_point|_blocks|[._]scales|_scale_2)$")
# Scales of activations and of the attention's cache, which a merge has no use for.
_OF_ACTIVATIONS = re.compile(r"[._](input|activation|output|q|k|v)_scale$")

# How to get plain weights, by what transformers calls the quantiser.
_REMEDIES = {
    "bitsandbytes": "load it with transformers, save model.dequantize() and merge that",
    "mxfp4": "load it with quantization_config=Mxfp4Config(dequantize=True), save and merge that",
    "compressed-tensors": "load it with quantization_config=CompressedTensorsConfig("
    "run_compressed=False), save and merge that",
}
_BLOCK = 128


class DequantisingLoader:
    """One of mergekit's tensor loaders, over a checkpoint whose weights are float8 with scales.

    W = q s, with one scale for the tensor, for a row, or for a block of both axes (as
    `weight_block_size` of its config says, or else 128 x 128).

    Arguments:
        loader: mergekit's `LazyTensorLoader`.
        block: Rows and columns of a block.

    `get_tensor` returns new float32 tensors of the weights that have a scale, one at a time, and
    all others as they are; the scales themselves are not in `index`.
    """

    def __init__(self, loader: Any, block: tuple[int, int]) -> None:
        self._loader, self._block = loader, block
        paths = loader.index.tensor_paths
        self._scale_of = dict(_scaled(headers_of(loader.index)))
        hidden = {*self._scale_of.values(), *filter(_OF_ACTIVATIONS.search, paths)}
        self.index = type(loader.index)(
            base_path=loader.index.base_path,
            is_safetensors=loader.index.is_safetensors,
            tensor_paths={name: path for name, path in paths.items() if name not in hidden},
            shards=loader.index.shards,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def get_tensor(self, key: str, device: str = "cpu", **options: Any) -> torch.Tensor | None:
        tensor: torch.Tensor | None = self._loader.get_tensor(key, device=device, **options)
        scale = self._scale_of.get(key)
        if tensor is None or scale is None:
            return tensor
        scales = self._loader.get_tensor(scale, device=device).to(torch.float32)
        return dequantised(tensor, scales, self._block)


def dequantised(
    tensor: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] = (_BLOCK, _BLOCK)
) -> torch.Tensor:
    """The weights that float8 numbers and their scales stand for.

    Arguments:
        tensor: (out, in), float8; borrowed.
        scales: float32; one number, one for each row, (out,) or (out, 1), or one for each block,
            (ceil(out / rows), ceil(in / columns)).
        block: Rows and columns of a block.

    Returns:
        tensor times its scales, (out, in) float32, new.
    """
    result = tensor.to(torch.float32)
    if scales.numel() == 1:
        return result.mul_(scales.reshape(()))
    if _are_of_rows(scales.shape, tensor.shape):
        return result.mul_(scales.reshape(-1, *[1] * (tensor.ndim - 1)))
    rows, columns = block
    for index, row in enumerate(scales):
        across = row.repeat_interleave(columns)[: tensor.shape[1]]
        result[index * rows : (index + 1) * rows].mul_(across)
    return result


def dequantising(loader: Any, model: str) -> Any:
    """A loader that reads a checkpoint as what it stands for: itself, if it is not quantised.

    Arguments:
        loader: mergekit's `LazyTensorLoader`.
        model: What the checkpoint is called, for messages.

    Raises:
        KarcherError: If it is quantised in a way that is not read here.
    """
    if isinstance(loader, DequantisingLoader):
        return loader
    headers = headers_of(loader.index)
    settings = _quantisation(Path(loader.index.base_path))
    scaled = dict(_scaled(headers))
    block = tuple(settings.get("weight_block_size") or (_BLOCK, _BLOCK))
    for name, header in headers.items():
        fits = name not in scaled or _fits(header, headers[scaled[name]], block)
        if _is_packed(name, headers, scaled) or not fits:
            how = settings.get("quant_method", "")
            remedy = _REMEDIES.get(how, "merge the model that it was made from")
            raise KarcherError(
                f"{model} is quantised{f' by {how}' if how else ''}, as {name} shows, and its "
                f"numbers are not its weights: {remedy}."
            )
    return DequantisingLoader(loader, block) if scaled else loader


def without_quantisation(config: Any) -> None:
    """Have the config of a result claim no quantisation: its weights are plain numbers.

    Arguments:
        config: transformers' config of the merged model; changed.
    """
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _scaled(headers: Mapping[str, Header]) -> Iterator[tuple[str, str]]:
    """The float8 weights that have scales, each with the name of those."""
    for name, header in headers.items():
        if header.dtype.startswith("F8"):
            companions = (name + suffix for suffix in _SCALES if name + suffix in headers)
            scale = next(companions, None)
            if scale is not None:
                yield name, scale


def _fits(weight: Header, scale: Header, block: tuple[int, ...]) -> bool:
    """Whether scales are one for the tensor, one for a row or one for a block."""
    if scale.size == 1 or _are_of_rows(scale.shape, weight.shape):
        return True
    if len(weight.shape) != 2 or len(block) != 2:
        return False
    return scale.shape == tuple(
        -(-size // side) for size, side in zip(weight.shape, block, strict=True)
    )


def _are_of_rows(scales: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether scales of that shape are one for each row; as many may also be those of blocks."""
    return tuple(scales) in ((weight[0],), (weight[0], *[1] * (len(weight) - 1)))


def _is_packed(name: str, headers: Mapping[str, Header], scaled: Mapping[str, str]) -> bool:
    """Whether a tensor is part of a quantisation that is not float8 with scales."""
    dtype = headers[name].dtype
    if _COMPANION.search(name):
        return True
    if _COMPANION_OR_PARAMETER.search(name) and dtype not in FLOATS:
        return True
    integers = dtype in ("I8", "U8", "I32") and len(headers[name].shape) > 1
    return integers and any(name + suffix in headers for suffix in _SCALES)


def _quantisation(folder: Path) -> dict[str, Any]:
    """What the config beside a checkpoint says of its quantisation."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    settings = config.get("quantization_config")
    return settings if isinstance(settings, dict) else {}
