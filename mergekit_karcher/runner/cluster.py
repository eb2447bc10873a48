"""Workers on the machines of a Ray cluster, which share a file system."""

from __future__ import annotations

import logging
import socket
from concurrent.futures import Future
from typing import Any

from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.runner.records import Record
from mergekit_karcher.runner.work import Job, do_unit

# How long an address may take to answer; Ray itself would try for minutes.
_SECONDS = 10

# How often Ray does a unit again whose worker was lost.
_RETRIES = 5


class RayWorkers:
    """Ray tasks, each with the CPUs of one worker, or one GPU with --cuda.

    Arguments:
        job: What they do units of.
        address: Of the cluster, as `ray.init` takes it.

    Raises:
        KarcherError: If Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, job: Job, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise KarcherError(
                "--ray needs Ray: pip install 'mergekit-karcher[ray]' on every machine."
            ) from None
        try:
            _reach(address)
            ray.init(
                address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR
            )
        except Exception as error:
            raise KarcherError(
                f"There is no Ray cluster at {address} ({first_line(error)}): start one with "
                "ray start --head, or give its address."
            ) from None
        self._ray = ray
        self._job = ray.put(job)
        gpus = 0 if job.recipe.options.device == "cpu" else 1
        self._task = ray.remote(
            num_cpus=job.threads, num_gpus=gpus, max_retries=_RETRIES, max_calls=0
        )(do_unit)

    def submit(self, name: str, mean: Any) -> Future[Record]:
        """Have a unit done; Ray does it again elsewhere if its worker is lost."""
        reference = self._task.remote(self._job, name, mean)
        future: Future[Record] = reference.future()
        return future

    def renew(self) -> None:
        """Ray starts its own workers anew."""

    def stop(self) -> None:
        """Leave the cluster, which ends what it still does for this merge."""
        self._ray.shutdown()


def _reach(address: str) -> None:
    """Raise `OSError` if nothing answers at an address that names a host and a port."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), _SECONDS).close()
