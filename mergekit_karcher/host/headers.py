"""What the checkpoints of a plan hold, read from the headers of their files alone."""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

# safetensors' words for the dtypes that a mean can be taken of.
FLOATS = ("F64", "F32", "F16", "BF16")

# Tensors that a network computes anew, whatever a checkpoint says of them.
_CONSTANT = re.compile(
    r"(^|[._])(masked_bias|(original_)?inv_freq|position_ids|token_type_ids|num_batches_tracked"
    r"|relative_position_index|(causal_|attention_|attn_)?mask|causal_bias|cos_cached|sin_cached"
    r"|freqs_cis|rope\.freqs|scale_attn|embed_positions\.weights)$"
)
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")


class Header(NamedTuple):
    """The dtype of a tensor, in safetensors' words, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def headers_of(index: Any) -> dict[str, Header]:
    """The headers of a checkpoint.

    Arguments:
        index: mergekit's `ShardedTensorIndex`.

    Returns:
        Those of its tensors by name. No weights are read; of a .bin file the pickle is.
    """
    headers: dict[str, Header] = {}
    for shard in sorted(set(index.tensor_paths.values())):
        path = Path(index.base_path, shard)
        is_safetensors = path.suffix.lower() == ".safetensors"
        headers |= _of_safetensors(path) if is_safetensors else _of_pickle(path)
    return {name: headers[name] for name in index.tensor_paths if name in headers}


def torch_dtype(header: Header) -> torch.dtype:
    """torch's dtype for that of a header; float32 for one that torch may not have."""
    return _DTYPES.get(header.dtype, torch.float32)


def is_constant(name: str, shape: Iterable[int]) -> bool:
    """Whether a tensor is a buffer that its network computes anew, such as a causal mask.

    A name that ends in attention.bias is a mask if it has the shape of one, (1, 1, length, length).
    """
    shape = tuple(shape)
    if _CAUSAL_MASK.search(name):
        return len(shape) == 4 and shape[:2] == (1, 1)
    return _CONSTANT.search(name) is not None


def may_be_constant(name: str) -> bool:
    """Whether a tensor of which nothing but the name is known may be such a buffer."""
    return bool(_CONSTANT.search(name) or _CAUSAL_MASK.search(name))


def is_parameter_by_name(name: str) -> bool:
    """Whether a tensor is called what trained parameters are called."""
    return name.rpartition(".")[2] in ("weight", "bias")


def identical(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether tensors are equal bit for bit, NaN and infinity included."""
    first, *others = tensors
    return all(
        other.dtype == first.dtype
        and other.shape == first.shape
        and torch.equal(_bits(other), _bits(first))
        for other in others
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _of_safetensors(path: Path) -> dict[str, Header]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: Header(one["dtype"], tuple(one["shape"])) for name, one in header.items()}


def _of_pickle(path: Path) -> dict[str, Header]:
    """None where the file holds more than tensors: whoever reads it will say so."""
    load = partial(torch.load, path, map_location="meta", weights_only=True)
    try:
        content = load(mmap=True)
    except pickle.UnpicklingError:
        return {}
    except RuntimeError:
        # Files of torch before 1.6 cannot be mapped.
        content = load()
    tensors: Mapping[str, Any] = content.get("state_dict", content)
    return {
        name: Header(WORDS.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }


# safetensors' words for torch's dtypes.
WORDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {word: dtype for dtype, word in WORDS.items()}
