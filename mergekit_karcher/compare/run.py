"""A whole comparison: models and merges measured one by one, and one of the merges chosen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from mergekit_karcher.compare import candidates as configs
from mergekit_karcher.compare.assemble import Alone, Measured, Settings, assemble
from mergekit_karcher.compare.bench import Bench, attempted
from mergekit_karcher.compare.candidates import Candidate
from mergekit_karcher.compare.grams import Grams, planned_grams, text_of_model
from mergekit_karcher.compare.judge import CHOOSING, REPORTING, Costs, Judge
from mergekit_karcher.compare.kept import Kept
from mergekit_karcher.compare.noise import rate
from mergekit_karcher.compare.numbers import Number, lengths_by_kind, numbers_of, weights_of
from mergekit_karcher.compare.result import Comparison, LeftOut, Tuned
from mergekit_karcher.compare.texts import check_tokenizers, named_data, read_texts
from mergekit_karcher.compare.tune import TRIES, tune
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.checkpoints import folders_of, open_checkpoint
from mergekit_karcher.metrics.examples import Source
from mergekit_karcher.metrics.model import class_of, classes_of, fitting, tokenizer_of
from mergekit_karcher.report.names import is_local, short_names

WORK = ".compare"
_GRAMS = "grams"
_BOTH = (CHOOSING, REPORTING)


@dataclass(frozen=True)
class Request:
    """What to compare.

    base, models: of the default merges; or configs: those to compare in their place. data: the
    texts, as NAME=PLACE. source: how to read them. windows: of each text to choose by, and as many
    to report by. out: the folder of the result. budget: minutes, or None for as long as it takes.
    tune: whether to search for the numbers of merges; a_kind: also for a length of each kind of
    module.
    """

    base: str | None
    models: Sequence[str]
    configs: Sequence[Path]
    data: Sequence[str]
    source: Source
    windows: int
    out: Path
    budget: float | None = None
    tune: bool = False
    a_kind: bool = False
    quiet: bool = False


def compare(request: Request, options: Any) -> tuple[Comparison, Candidate]:
    """Measure all merges of a request, or go on where an earlier run was stopped.

    Arguments:
        request: What to compare.
        options: mergekit's `MergeOptions`.

    Returns:
        The result, and the merge that was chosen, as mergekit would be given it.

    Raises:
        KarcherError: For what the user can mend; what was measured by then is kept.
    """
    named = named_data(request.data)
    given = configs.candidates_of(request.configs)
    models = configs.models_of(given)
    if not given:
        models = _models(request)
    with _in_use(request.out) as work:
        run = _Run(request, named, models, work, options)
        run.measure_models()
        run.measure_merges(given or run.default_candidates())
        if request.tune:
            run.tune()
        return run.result()


def _models(request: Request) -> list[str]:
    if request.base is None:
        raise KarcherError(
            "Say by --base what the models were fine-tuned from, or give configs of mergekit to "
            "compare in the place of models."
        )
    models = [model for model in dict.fromkeys(request.models) if model != request.base]
    if len(models) < 2:
        raise KarcherError("Give two models or more, beside their base, or configs of mergekit.")
    return [request.base, *models]


class _Run:
    """One comparison while it is measured."""

    def __init__(
        self,
        request: Request,
        named: Mapping[str, str],
        models: Sequence[str],
        work: Path,
        options: Any,
    ) -> None:
        self._request, self._models, self._options = request, models, options
        self._begin = time.monotonic()
        places = {m: str(folders_of(m, options.transformers_cache)[0]) for m in models}
        first = places[models[0]]
        self._config, _ = class_of(first)
        classes = classes_of(first)
        tokenizer = tokenizer_of(first)
        self._source = fitting(request.source, self._config, tokenizer)
        self._texts = read_texts(
            named, self._source, request.windows, tokenizer, classes, quiet=request.quiet
        )
        check_tokenizers(places, self._texts)
        self._judge = Judge(self._texts, classifies=classes is not None)
        self._kept = Kept(work, self._texts, self._judge, options)
        self._bench = Bench(work, self._judge, self._kept, options)
        self._names = short_names(models, is_local)
        self._alone: dict[str, Costs] = {}
        self._merges: list[Measured] = []
        self._left_out: list[LeftOut] = []
        self._grams: Grams | None = None

    def measure_models(self) -> None:
        """Measure each model as it is."""
        with self._bar("models", len(self._models)) as bar:
            for model in self._models:
                bar.set_postfix_str(self._names[model])
                self._alone[model] = self._bench.of_model(model, _BOTH)
                bar.update()

    def default_candidates(self) -> list[Candidate]:
        """Those of a base and its fine-tunes."""
        base, *models = self._models
        dtype = str(self._config.dtype).removeprefix("torch.")
        rates = {model: self._rates(self._alone[model]) for model in self._models}
        owned = {model: text_of_model(rates[model], rates[base]) for model in models}
        texts = {text.name: text for text in self._texts}
        try:
            self._grams = planned_grams(
                self._request.out / _GRAMS,
                {model: texts[name] for model, name in owned.items()},
                self._names,
                self._kept,
            )
        except KarcherError as error:
            self._left_out.append(LeftOut(name=configs.GRAMS, why=error.format_message()))
        places = {} if self._grams is None else self._grams.places
        return configs.default_candidates(base, models, dtype, places)

    def measure_merges(self, candidates: Sequence[Candidate]) -> None:
        """Measure merges, the first of which is what the others are compared with."""
        with self._bar("merges", len(candidates)) as bar:
            for place, candidate in enumerate(candidates):
                bar.set_postfix_str(candidate.name)
                if place > 0 and self._time_is_up():
                    self._left_out.append(LeftOut(name=candidate.name, why=self._over))
                    continue
                self._measure(candidate, needed=place == 0)
                bar.update()

    @property
    def _over(self) -> str:
        return f"the {self._request.budget:g} minutes of --budget were over"

    def _measure(self, candidate: Candidate, *, needed: bool, tuned: Sequence[Tuned] = ()) -> None:
        def measure() -> Costs:
            if candidate.name == configs.GRAMS and self._grams is not None:
                self._grams.make(self._source)
            return self._bench.of_merge(candidate, _BOTH)

        costs = measure() if needed else attempted(measure)
        if isinstance(costs, str):
            self._left_out.append(LeftOut(name=candidate.name, why=self._without_paths(costs)))
        else:
            self._merges.append(Measured(candidate, costs, tuned))

    def _without_paths(self, sentence: str) -> str:
        """A sentence that says nothing of this machine."""
        for reference, name in self._names.items():
            sentence = sentence.replace(reference, name)
        return sentence.replace(f"{self._request.out.absolute()}/", "")

    def tune(self) -> None:
        """Search for the numbers of every merge, the best first, then for more of the best."""
        for measured in sorted(self._merges, key=self._mean):
            config = measured.candidate.config
            self._tune(measured, config, numbers_of(config), "tuned")
        best = min(self._merges, key=self._mean)
        config = best.candidate.config
        self._tune(best, config, weights_of(config, self._names), "tuned weights")
        if self._request.a_kind:
            index = open_checkpoint(self._models[0], self._options.transformers_cache).index
            for measured in sorted(self._merges, key=self._mean):
                config, numbers = lengths_by_kind(measured.candidate.config, index.tensor_paths)
                if numbers:
                    self._tune(measured, config, numbers, "length a kind")
                    return

    def _tune(
        self, measured: Measured, config: Mapping[str, Any], numbers: Sequence[Number], how: str
    ) -> None:
        """Add a merge with better numbers, if there are any."""
        if not numbers:
            return
        name = f"{measured.candidate.name}, {how}"
        with self._bar(name, len(numbers) * (TRIES + 1)) as bar:

            def cost(config: Mapping[str, Any]) -> float | None:
                if self._time_is_up():
                    return None
                candidate = replace(measured.candidate, config=config)
                costs = attempted(lambda: self._bench.of_merge(candidate, (CHOOSING,)))
                bar.update()
                return math.inf if isinstance(costs, str) else self._mean_of(costs)

            config, tuned, in_time = tune(config, numbers, cost)
        if not in_time:
            self._left_out.append(LeftOut(name=f"more values for {name}", why=self._over))
        if tuned:
            candidate = replace(measured.candidate, name=name, config=config)
            self._measure(candidate, needed=False, tuned=[*measured.tuned, *tuned])

    def result(self) -> tuple[Comparison, Candidate]:
        """What came of it all."""
        settings = Settings(
            "errors" if self._judge.classifies else "bits per byte",
            self._judge.device,
            str(self._judge.dtype).removeprefix("torch."),
            self._source.length,
        )
        alone = [
            Alone(self._names[model], model == self._request.base, costs)
            for model, costs in self._alone.items()
        ]
        return assemble(settings, self._texts, self._merges, alone, self._left_out, self._names)

    def _rates(self, costs: Costs) -> dict[str, float]:
        sizes = {text.name: text.choosing.sizes for text in self._texts}
        return {name: rate(values, sizes[name]) for name, values in costs[CHOOSING].items()}

    def _mean_of(self, costs: Costs) -> float:
        rates = self._rates(costs)
        return sum(rates.values()) / len(rates)

    def _mean(self, measured: Measured) -> float:
        return self._mean_of(measured.costs)

    def _time_is_up(self) -> bool:
        """Whether one more merge would take longer than there is time."""
        if self._request.budget is None:
            return False
        took = self._bench.seconds
        needed = sum(took) / len(took) if took else 0.0
        return time.monotonic() - self._begin + needed > 60 * self._request.budget

    def _bar(self, title: str, total: int) -> Any:
        return tqdm(total=total, desc=title, disable=self._request.quiet)


@contextmanager
def _in_use(out: Path) -> Iterator[Path]:
    """The working folder in that of the result, for this run alone."""
    work = out / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / "lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise KarcherError(
            f"Another comparison is writing to {out}: wait for its end, or name another --out."
        ) from None
    except OSError as error:
        raise KarcherError(f"{out} cannot be written to: {error.strerror}.") from None
    try:
        yield work
    finally:
        lock.release()
