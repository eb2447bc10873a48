"""Fresh interpreters, as users start them, and forks of this process, which start at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback

from tqdm import tqdm

from mergekit_karcher.cli.main import main


def run(code, *options, **environment):
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "could not take its place" not in done.stderr
    return done.stdout.strip()


def fork(arguments, log, prepare=None):
    """The id of a forked process that runs our command, as the leader of a group of processes.

    arguments: of `mergekit-karcher`. log: where its output goes. prepare: is called in it first.
    """
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.setsid()
        # A process that is killed while it has the lock of progress bars must not keep ours.
        tqdm.set_lock(multiprocessing.RLock())
        with log.open("w") as sys.stdout:
            sys.stderr = sys.stdout
            if prepare is not None:
                prepare()
            main.main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc(file=log.open("a"))
    finally:
        os._exit(status)


def end_of(process, seconds=120):
    """The exit code of a forked process, negative for the signal that ended it."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise TimeoutError(f"process {process} did not end in {seconds} s")
