"""Merging one candidate at a time into a scratch folder, judging it, and deleting it."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mergekit_karcher.compare.candidates import Candidate
from mergekit_karcher.compare.judge import Costs, Judge
from mergekit_karcher.compare.kept import Kept
from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.host.checkpoints import folders_of
from mergekit_karcher.runner.driver import Settings, merge

_LOG = logging.getLogger(__name__)

_SCRATCH = "merging"


class Bench:
    """Measures merges and models, or says what an earlier run has measured of them.

    Arguments:
        work: A folder for this comparison alone, which must exist.
        judge: What judges.
        kept: What was measured.
        options: mergekit's `MergeOptions`.

    seconds: what each took that was measured now.
    """

    def __init__(self, work: Path, judge: Judge, kept: Kept, options: Any) -> None:
        self._scratch = work / _SCRATCH
        self._judge, self._kept = judge, kept
        self._options = options.model_copy(
            update={"quiet": True, "write_model_card": False, "copy_tokenizer": False}
        )
        self.seconds: list[float] = []

    def of_merge(self, candidate: Candidate, purposes: Sequence[str]) -> Costs:
        """What the windows cost a merge.

        Arguments:
            candidate: The merge.
            purposes: Which windows; see `Judge.judge`.

        Raises:
            KarcherError: If it cannot be merged, or judged.
        """
        return self._measure(candidate.config, candidate.source, purposes)

    def of_model(self, reference: str, purposes: Sequence[str]) -> Costs:
        """What the windows cost a model as it is, as `of_merge`."""
        subject = {"model": reference}
        source = None
        if len(folders_of(reference, self._options.transformers_cache)) > 1:
            # A base with an adapter: mergekit puts them together.
            source = Candidate(
                reference, {"merge_method": "passthrough", "models": [subject]}, 0
            ).source
        return self._measure(subject, source, purposes)

    def _measure(
        self, subject: Mapping[str, Any], source: str | None, purposes: Sequence[str]
    ) -> Costs:
        known = self._kept.load(self._kept.key(subject), purposes)
        if known is not None:
            return known
        begin = time.monotonic()
        if source is None:
            (folder,) = folders_of(subject["model"], self._options.transformers_cache)
            costs = self._judge.judge(str(folder), purposes)
        else:
            costs = self._merged(self._kept.key(subject), source, purposes)
        self._kept.keep(subject, costs)
        self.seconds.append(time.monotonic() - begin)
        return costs

    def _merged(self, key: str, source: str, purposes: Sequence[str]) -> Costs:
        # What an interrupted run has merged of the same is gone on with.
        folder = self._scratch / key[:32]
        for other in self._scratch.glob("*"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
        merge(
            source,
            folder,
            self._options,
            Settings(overwrite=True, quiet=True, in_process=True),
        )
        try:
            costs = self._judge.judge(str(folder), purposes)
        except KarcherError as error:
            words = error.format_message().replace(str(folder), "The merge")
            raise KarcherError(words) from None
        shutil.rmtree(folder)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return costs


def attempted(measure: Callable[[], Costs]) -> Costs | str:
    """What it measures, or why it cannot, in one sentence."""
    try:
        return measure()
    except KarcherError as error:
        return error.format_message()
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # mergekit and its methods raise errors of many kinds.
        _LOG.debug("left out", exc_info=True)
        return f"{type(error).__name__}: {first_line(error)}"
