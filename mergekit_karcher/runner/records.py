"""What is kept of a unit that is done, beside its shard."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import safe_globals

from mergekit_karcher.files import replacing
from mergekit_karcher.host.tally import Tally
from mergekit_karcher.means.products import Products
from mergekit_karcher.means.result import KarcherMean
from mergekit_karcher.report.apart import Apart
from mergekit_karcher.report.observation import Observation
from mergekit_karcher.runner.shards import Written
from mergekit_karcher.sphere.pairwise import PairwiseGeometry
from mergekit_karcher.sphere.results import Status

# What a record ends in.
DONE = ".done"


@dataclass(frozen=True, eq=False)
class Record:
    """The result of a unit.

    written: its shard; None where it only took inner products. tally: what its tensors add up to;
    None where the merge is not of ours. products: of its parts of the model, None for a buffer.
    """

    written: Written | None
    tally: Tally | None
    products: tuple[Products | None, ...] = ()


# The unpickler of torch refuses everything else.
_KNOWN: list[Any] = [
    *(Record, Written, Tally, Apart, Observation, PairwiseGeometry, KarcherMean, Products, Status),
    *(np.ndarray, np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.longdouble))),
    *(type(np.dtype(np.int64)), type(np.dtype(np.bool_))),
    np.zeros(1).__reduce__()[0],
    np.float64(0).__reduce__()[0],
]


def store(record: Record, path: Path) -> None:
    """Write a record to a file, whole or not at all; raises `OSError`."""
    content = io.BytesIO()
    torch.save(record, content)  # To a full disk it would raise an error that does not say so.
    with replacing(path) as partial:
        partial.write_bytes(content.getbuffer())


def load(path: Path) -> Record | None:
    """Read a record; None where there is none that can be read."""
    try:
        with safe_globals(_KNOWN):
            record: Record = torch.load(path, weights_only=True)
    except FileNotFoundError:
        return None
    return record
