"""One thread a stripe of the work, instead of one parallel region a torch call.

A pass over a tensor makes thousands of short calls. Run as parallel regions, each would wait for
its slowest thread: with two other busy processes on two cores, that took 20 to 50 times longer
than on a quiet machine (`linear`, with few and long calls: twice). Threads that each work through
a stripe of their own meet only once, at its end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

# More would not be faster: the passes are bound by memory bandwidth. It also bounds the scratch.
_MOST_WORKERS = 8

# Up to here torch itself runs a call on one thread.
_serial_values = 1 << 15


def worker_count(device: torch.device, pieces: int) -> int:
    """How many stripes that many pieces on that device are cut into, one for each worker."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return max(1, min(threads, _MOST_WORKERS, pieces))


def run_workers(work: Callable[[int], None], count: int, device: torch.device, values: int) -> None:
    """Call work, which records no gradients, with the number of each of count workers, in no order.

    On the CPU each has a thread, but where the pass reads few values: waking one would cost more
    than it saves.
    """
    inference = torch.is_inference_mode_enabled()

    def run(index: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(index)

    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or values <= _serial_values:
        for index in range(count):
            run(index)
    else:
        list(_pool(threads).map(run, range(count)))  # the list raises what a worker raised


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch itself uses one thread each."""
    count = min(threads, _MOST_WORKERS)
    all_started = threading.Barrier(count)

    def prepare() -> None:
        # torch gives a thread its default at the first look, so look before setting.
        torch.get_num_threads()
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, "mergekit-karcher", prepare)
    list(pool.map(lambda _: all_started.wait(), range(count)))
    # The last value set is also what threads of the program start with later.
    torch.set_num_threads(threads)
    return pool


def _after_fork() -> None:
    """A forked child has the pool but not its threads, nor those that OpenMP believes to have."""
    global _serial_values
    _serial_values = 0
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
