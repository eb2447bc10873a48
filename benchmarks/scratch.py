"""Peak scratch memory of one weight, from the allocations that torch's profiler records."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate

import torch
from contestants import BUILTIN, CONTESTANTS, Merge, Tensors, builtin, random_group
from rows import Row, row
from torch.profiler import ProfilerActivity, profile

# The built-in has allocated all that it ever needs after one iteration.
_CONTESTANTS = CONTESTANTS | {BUILTIN: partial(builtin, max_iter=2)}


def scratch(side: int) -> Iterator[Row]:
    """Every contestant for two numbers of models, alike and of mixed dtypes.

    The profiler sees the calling thread only. With torch's default number of threads our buffers
    are allocated there, but not what torch itself needs within a call in a worker; with one thread
    everything is.
    """
    default = torch.get_num_threads()
    for count in (2, 17):
        half = random_group("fine-tunes", count, (side, side), torch.bfloat16)
        mixed = [t.float() if index % 2 else t for index, t in enumerate(half)]
        for dtype, group in (("bf16", half), ("bf16 and fp32", mixed)):
            for threads in sorted({default, 1}):
                torch.set_num_threads(threads)
                tensors = f"{side} x {side}"
                case = {"tensors": tensors, "dtype": dtype, "models": count, "threads": threads}
                for name, merge in _CONTESTANTS.items():
                    yield row("scratch", case, name, _peak(merge, group))
    torch.set_num_threads(default)


def _peak(merge: Merge, group: Tensors) -> dict[str, float]:
    """The most bytes alive at once, the result among them, the inputs not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = merge(group)
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(accumulate(size for _, size in changes))
    over = (peak - result.nbytes) / 1e6
    return {"outputs": round(peak / result.nbytes, 3), "mb_over_one_output": round(over, 2)}
