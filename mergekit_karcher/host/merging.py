"""mergekit's `run_merge` with another way to execute its plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import mergekit.merge
import yaml
from mergekit.config import MergeConfiguration

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host import compat
from mergekit_karcher.host.checkpoints import restricted_unpickling
from mergekit_karcher.host.documents import named_in
from mergekit_karcher.host.install import register
from mergekit_karcher.host.places import check_places
from mergekit_karcher.host.planned import PlannedMerge
from mergekit_karcher.host.stand_ins import headers_only, to_fetch


@dataclass(frozen=True)
class Recipe:
    """All that it takes to plan a merge, in any process that sees the same files.

    source: the config, as YAML text. out: where mergekit is told to save. options: mergekit's
    `MergeOptions`. folder: where relative paths begin.
    """

    source: str
    out: Path
    options: Any
    folder: Path

    def to_fetch(self) -> list[str]:
        """The models that are on the Hub and not here, as the config names them."""
        references = list(dict.fromkeys(named_in(yaml.safe_load(self.source))))
        cache = self.options.transformers_cache
        check_places(references, folder=self.folder, cache=cache)
        return to_fetch(references, cache)

    def by_headers(self, models: Iterable[str]) -> AbstractContextManager[None]:
        """Plan with the headers alone of some models, as `to_fetch` names them.

        What is planned within must not be executed, and tells of its inputs only within.
        """
        return headers_only(models, self.options.transformers_cache)


def carry_out(recipe: Recipe, execute: Callable[[PlannedMerge], None]) -> None:
    """Run mergekit's merge, which plans it and saves config, tokenizer and card.

    Arguments:
        recipe: What to merge.
        execute: Is called once in between, to merge the tensors and save them.

    Raises:
        KarcherError: For what is wrong with the config or the inputs.
        Exception: Whatever mergekit raises.
    """
    register()
    compat.check("mergekit.merge")
    document = yaml.safe_load(recipe.source)
    check_places(
        list(named_in(document)), folder=recipe.folder, cache=recipe.options.transformers_cache
    )
    with (
        _executed_by(execute, recipe.options),
        _models_in_order(document),
        restricted_unpickling(),
    ):
        config = MergeConfiguration.model_validate(document)
        mergekit.merge.run_merge(
            config, str(recipe.out), options=recipe.options, config_source=recipe.source
        )


def plan(recipe: Recipe) -> PlannedMerge:
    """Plan a merge, and do nothing of it. Moves to the folder where its relative paths begin."""

    class Planned(BaseException):
        """Carries the plan out of mergekit's function."""

    def stop(merge: PlannedMerge) -> NoReturn:
        raise Planned(merge)

    os.chdir(recipe.folder)
    try:
        carry_out(recipe, stop)
    except Planned as planned:
        merge: PlannedMerge = planned.args[0]
        return merge
    raise KarcherError("mergekit ran a merge without executing its plan: upgrade mergekit-karcher.")


@contextmanager
def _models_in_order(document: Any) -> Iterator[None]:
    """Have mergekit go through the models in the order in which a config names them.

    It keeps them in a set, so that in each process another one may come first: that which gives the
    tokenizer, and the first tokens of a united vocabulary.
    """
    places = {name: place for place, name in reversed(list(enumerate(named_in(document))))}
    referenced_models = MergeConfiguration.referenced_models

    def in_order(self: Any) -> list[Any]:
        models = referenced_models(self)
        return sorted(models, key=lambda m: (places.get(str(m), len(places)), str(m)))

    with mock.patch.object(MergeConfiguration, "referenced_models", in_order):
        yield


@contextmanager
def _executed_by(execute: Callable[[PlannedMerge], None], options: Any) -> Iterator[None]:
    """Have `run_merge` hand its plan to a function of ours in the place of its executors."""

    class Ours:
        """Has the interface of mergekit's executors, as far as `run_merge` uses it."""

        def __init__(self, targets: Sequence[Any], **_: Any) -> None:
            self._merge = PlannedMerge(targets, options)

        def run(self, quiet: bool = False) -> Iterator[tuple[Any, Any]]:
            execute(self._merge)
            if self._merge.tokenizer is not None:
                yield self._merge.tokenizer_task, self._merge.tokenizer

    names = ("Executor", "MultiGPUExecutor")
    theirs = {name: getattr(mergekit.merge, name) for name in names}
    try:
        for name in names:
            setattr(mergekit.merge, name, Ours)
        yield
    finally:
        for name, executor in theirs.items():
            setattr(mergekit.merge, name, executor)
