"""How many workers this machine has room for, and how many threads each takes."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from mergekit_karcher.host.planned import PlannedMerge

# More threads a worker gain little: a merge is bound by memory.
_MOST_THREADS = 4

# What a worker needs beside its tensors.
_WORKER_BYTES = 200 << 20


def cores() -> int:
    """How many cores torch would use; ask before its number of threads is set."""
    return int(torch.get_num_threads())


def threads_a_worker(merge: PlannedMerge, cores: int, options: Any) -> int:
    """How many threads torch may use in each worker: one, but where units are fewer than cores.

    Processes share cores better than threads do, which wait for each other in every operation. The
    number of workers does not matter here, because some methods sum in another order when their
    threads are more, and the result must not depend on the workers.
    """
    return int(options.num_threads or min(max(1, cores // _most_at_once(merge)), _MOST_THREADS))


def worker_count(merge: PlannedMerge, cores: int, threads: int, options: Any) -> int:
    """How many workers this machine has cores, memory and work for."""
    if options.device != "cpu":
        return 1
    fit = int(psutil.virtual_memory().available // (merge.memory() + _WORKER_BYTES))
    return max(1, min(_most_at_once(merge), cores // threads, fit))


def _most_at_once(merge: PlannedMerge) -> int:
    """Units that can be done at the same time."""
    of_model = sum(unit.whole_model for unit in merge.units)
    return max(1, of_model, len(merge.units) - of_model)
