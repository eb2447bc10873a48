"""The report that a merge writes as it goes: one more task at the end of its plan."""

# mergekit's tasks are pydantic models, which read annotations: they must be real ones here.
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mergekit_karcher.host.run import Stage
from mergekit_karcher.report.build import Planned, build
from mergekit_karcher.report.store import NO_PLOTS, write

_LOG = logging.getLogger(__name__)


@cache
def _task_type() -> Any:
    """Made when mergekit is whole."""
    from mergekit.graph import Task

    class WriteReport(Task[Any]):  # type: ignore[misc]
        """Writes what was seen while the tasks before it ran. Equal only to itself."""

        after: tuple[Task, ...]
        planned: Any
        stage: Any
        folder: Path

        def __hash__(self) -> int:
            return id(self)

        def __eq__(self, other: object) -> bool:
            return self is other

        def arguments(self) -> dict[str, Any]:
            return {str(index): task for index, task in enumerate(self.after)}

        def main_thread_only(self) -> bool:
            return True

        def execute(self, **_: Any) -> None:
            try:
                report = build(self.planned, self.stage.observations, self.stage.means)
                if not write(report, self.folder):
                    _LOG.warning(NO_PLOTS)
            except Exception as error:
                # All weights are saved; mergekit has yet to save config and tokenizer.
                _LOG.error("The report was not written to %s: %s.", self.folder, error)
                _LOG.debug("stopped by", exc_info=True)

    return WriteReport


def with_report(tasks: Sequence[Any], planned: Planned, stage: Stage, folder: Path) -> list[Any]:
    """The tasks of a plan, and one that runs after the last of them has saved its tensors."""
    last = [task for task in tasks if hasattr(task, "tensor_save_tasks")] or tasks
    report = _task_type()(after=tuple(last), planned=planned, stage=stage, folder=folder)
    return [*tasks, report]
