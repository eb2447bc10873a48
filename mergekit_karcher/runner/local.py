"""Processes of this machine that do units."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from tqdm import tqdm

from mergekit_karcher.runner.records import Record
from mergekit_karcher.runner.work import Job, do_unit, forget


class LocalWorkers:
    """Processes of this machine, forked where that is safe: they need not plan again.

    Arguments:
        job: What they do units of.
        count: How many there are.
        own_gpus: Whether each has a GPU to itself.
    """

    def __init__(self, job: Job, count: int, *, own_gpus: bool) -> None:
        self._job, self._count, self._own_gpus = job, count, own_gpus
        on_cpu = job.recipe.options.device == "cpu"
        # A fork after CUDA was asked for anything cannot use it; macOS forbids forks of programs
        # that use its libraries.
        forks = on_cpu and os.uname().sysname == "Linux" if hasattr(os, "uname") else False
        self._context = multiprocessing.get_context("fork" if forks else "spawn")
        self._pool = self._new_pool()

    def submit(self, name: str, mean: Any) -> Future[Record]:
        """Have a unit done; a lost process makes the future raise `BrokenProcessPool`."""
        try:
            with _held_back(signal.SIGTERM):
                return self._pool.submit(do_unit, self._job, name, mean)
        except BrokenProcessPool as error:  # One was lost before all units were handed out.
            lost: Future[Record] = Future()
            lost.set_exception(error)
            return lost

    def renew(self) -> None:
        """Start processes in the place of those of which one was lost."""
        self.stop()
        self._pool = self._new_pool()

    def stop(self) -> None:
        """End all processes at once, whatever they do."""
        for process in multiprocessing.active_children():
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _new_pool(self) -> ProcessPoolExecutor:
        number = self._context.Value("i", 0)
        return ProcessPoolExecutor(
            self._count, self._context, _prepare, (number if self._own_gpus else None,)
        )


class ThisProcess:
    """Does units one after the other in the process that asks for them.

    Arguments:
        job: What they are units of.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def submit(self, name: str, mean: Any) -> Future[Record]:
        """Do a unit; the future is done."""
        future: Future[Record] = Future()
        try:
            future.set_result(do_unit(self._job, name, mean))
        except Exception as error:
            future.set_exception(error)
        return future

    def renew(self) -> None:
        """Nothing: no process was lost."""

    def stop(self) -> None:
        """Let go of the plan and of the files that it has open."""
        forget(self._job.recipe)


@contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """Take that signal later, and have processes that are forked meanwhile start in this way.

    Until they have prepared themselves they would handle it as the process that forks them does.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (number,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare(number: Any) -> None:
    """What a new process does first: it ends with the one that started it, and not by Ctrl-C.

    number: counts the processes, each of which takes the GPU of its number; None to share.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    # That of the bars is shared by all processes, and one that is killed would keep it for ever.
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if number is not None:
        with number.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = str(number.value)
            number.value += 1


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
