"""Experts of three optimizers, merged in the metrics of each: `python benchmarks/optimizers.py`.

Tiny Llama experts for the demo's three kinds of text, from one base, by SGD with momentum, AdamW
and Muon, which orthogonalises its steps; and fine-tunes of SmolLM2-135M. Rows go to
optimizers.json, tables to optimizers.md and a chart to optimizers.png beside this script.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain
from operator import truediv
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path += [str(Path(__file__).resolve().parents[1] / p) for p in ("benchmarks/quality", "demo")]
from rows import Row, row

# transformers would take benchmarks/kernels.py for the package of that name.
sys.path.pop(0)

import smollm
import torch
import train as demo
from cache import cached
from contestants import TASK_ARITHMETIC, WITH_BASE
from language import Sizes, judge, load_state, model_of, state_of, train_base
from mergekit.merge_methods import merge_state_dicts
from problem import Problem, State
from texts import KINDS, load
from torch import nn
from tqdm import tqdm

from mergekit_karcher import fisher_mean, karcher_mean
from mergekit_karcher.metrics.diagonal import Batch, DiagonalFisher
from mergekit_karcher.metrics.moments import Moments

_HERE = Path(__file__).resolve().parent

SEEDS = 3
BASE, OWN, LINEAR = "base", "own expert", "linear"
MIXED = "three optimizers"
# The learning rates that left an expert about as good on its own text, and not much worse on the
# others, on one seed: SGD from 0.1 to 1, Muon from 0.003 to 0.03.
RATES = {"AdamW": 1e-3, "SGD": 0.15, "Muon": 4e-3}
EXAMPLES, WINDOW, BATCH = 500, 64, 10
SMOLLM, SMOLLM_EXAMPLES = "SmolLM2-135M", 48
# Bits per byte beyond linear's, in the chart.
_WORST_SHOWN = 0.25
# Merges that need the base and no data, as in quality/run.py.
FROM_WEIGHTS = [
    LINEAR,
    *(name for name in WITH_BASE if name.startswith(TASK_ARITHMETIC)),
    *("self, ridge 0.1", "self, ridge 0.3", "self, ridge 1.0", "Iso-C", "TSV-M", "ties"),
]

Metric = dict[str, torch.Tensor]
Metrics = Mapping[str, Callable[[], Sequence[Metric]]]


def optimizers(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    """One of the three; Muon is for matrices, and leaves embeddings and norms to AdamW."""
    rate = RATES[name]
    if name == "SGD":
        return [torch.optim.SGD(model.parameters(), rate, momentum=0.9)]
    if name == "AdamW":
        return [torch.optim.AdamW(model.parameters(), rate)]
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in named if p.ndim != 2 or "embed" in n]
    return [torch.optim.Muon(matrices, rate), torch.optim.AdamW(rest, RATES["AdamW"])]


def windows(
    stream: torch.Tensor, count: int, generator: torch.Generator, length: int = WINDOW
) -> torch.Tensor:
    """Random windows of a text."""
    starts = torch.randint(len(stream) - length, (count,), generator=generator).tolist()
    return torch.stack([stream[start : start + length] for start in starts])


def expert(base: State, stream: torch.Tensor, name: str, seed: int, steps: int) -> State:
    """The base, trained on one text."""
    model = model_of(Sizes())
    load_state(model, base)
    model.train()
    used = optimizers(name, model)
    plans = [
        torch.optim.lr_scheduler.OneCycleLR(
            own, own.param_groups[0]["lr"], total_steps=steps, cycle_momentum=False
        )
        for own in used
    ]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = windows(stream, demo.SETTINGS["batch"], generator)
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for own, plan in zip(used, plans, strict=True):
            own.step()
            own.zero_grad()
            plan.step()
    return state_of(model)


def fisher(
    model: nn.Module, examples: torch.Tensor, sampler: torch.Generator | None, batch: int = BATCH
) -> Metric:
    """The diagonal Fisher information on windows of the text that an expert was trained on."""
    found = DiagonalFisher(model.eval())
    for some in tqdm(examples.split(batch), desc="Fisher"):
        found.add(Batch(some), sampler)
    return found.metric()


def adam(state: State, stream: torch.Tensor, seed: int, steps: int) -> Metric:
    """What AdamW keeps of as many batches as training had, seen without taking a step.

    The same for every expert, whatever it was trained by: two of the three keep no such state.
    """
    model = model_of(Sizes())
    load_state(model, state)
    own = torch.optim.AdamW(model.parameters(), 0.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2000 + seed)
    for _ in range(steps):
        batch = windows(stream, demo.SETTINGS["batch"], generator)
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        own.step()
        own.zero_grad()
    (group,) = own.param_groups
    return {
        name: Moments(
            own.state[p]["exp_avg_sq"], float(own.state[p]["step"]), group["betas"][1], group["eps"]
        ).metric()
        for name, p in model.named_parameters()
    }


def even(metric: Metric) -> Metric:
    """Scaled to mean one over the whole model, so that no expert is surer than another."""
    total = sum(float(own.sum(dtype=torch.float64)) for own in metric.values())
    mean = total / sum(own.numel() for own in metric.values())
    return {name: own / mean for name, own in metric.items()}


def merged(mean: Callable[..., Any], states: Sequence[State], metrics: Sequence[Metric]) -> State:
    """Tensor by tensor."""
    return {
        name: mean([state[name] for state in states], [metric[name] for metric in metrics])
        for name in states[0]
    }


def from_weights(base: State, states: Sequence[State]) -> Iterator[tuple[str, State]]:
    """Merges of the changes from the base, by name."""
    for name in FROM_WEIGHTS:
        yield name, WITH_BASE[name](base, states)


def from_metrics(
    base: State, states: Sequence[State], metrics: Metrics
) -> Iterator[tuple[str, State]]:
    """Merges of the experts without a metric, and in each of them, by name."""

    def plain(method: str, **parameters: Any) -> State:
        return dict(merge_state_dicts(states, method, parameters=parameters))

    def around_base(magnitude: str, own: Sequence[Metric] | None) -> State:
        return {
            name: karcher_mean(
                [state[name] for state in states],
                base=base[name],
                granularity="row",
                magnitude=magnitude,
                metrics=None if own is None else [metric[name] for metric in own],
            )[0]
            for name in base
        }

    for name, make in {"": None, **metrics}.items():
        end, own = f", {name}" if name else "", make and make()
        if own is None:
            yield "karcher", plain("karcher")
        else:
            yield f"fisher{end}", merged(fisher_mean, states, own)
            yield f"fisher{end}, even", merged(fisher_mean, states, [even(m) for m in own])
            in_metric = partial(merged, lambda t, m: karcher_mean(t, metrics=m)[0])
            yield f"karcher{end}", in_metric(states, own)
        yield f"karcher, row, base{end}", around_base("arithmetic", own)
        yield f"karcher, row, base, linear length{end}", around_base("linear", own)


def objective(state: State, states: Sequence[State], metrics: Sequence[Metric]) -> float:
    """J = sum_k sum_i G_ki (W_i - W_ki)^2."""
    return sum(
        float((metric[name].double() * (state[name] - own[name]).double().square()).sum())
        for own, metric in zip(states, metrics, strict=True)
        for name in state
    )


class Contest(NamedTuple):
    """Experts to be merged, their metrics by name, and how to judge a merge, in bits per byte."""

    case: Mapping[str, Any]
    base: State
    states: Sequence[State]
    metrics: Metrics
    bits: Callable[[State], dict[str, float]]
    own: Mapping[str, float]


def tiny(cache: Path, seeds: int, quick: bool) -> Iterator[Contest]:
    """The demo's models: each optimizer on each text in turn, and all three experts by one."""
    steps, count = (2, 4) if quick else (demo.SETTINGS["expert"]["steps"], EXAMPLES)
    sizes = Sizes(base_steps=2, expert_steps=2) if quick else Sizes()
    tokenizer = demo.byte_tokenizer()
    texts = {kind: load(kind) for kind in KINDS}
    streams = {k: torch.tensor(tokenizer(text.train).input_ids) for k, text in texts.items()}
    held_out = {
        k: torch.tensor(tokenizer(text.held_out).input_ids).unfold(0, WINDOW, WINDOW)
        for k, text in texts.items()
    }
    model = model_of(sizes)
    for seed in range(seeds):
        demo.SETTINGS["seed"] = seed
        common = {"seed": seed, "steps": steps, "base": sizes.base_steps, "rates": RATES}
        base = cached(
            cache, "base", common, partial(train_base, seed, sizes, list(streams.values()))
        )

        def made(what: str, kind: str, name: str, make: Callable[[], State], seen: Any) -> State:
            return cached(cache, f"{what}-{kind}-{name}", seen | {"examples": count}, make)

        experts, metrics = {}, {}
        for kind, stream in streams.items():
            some = windows(stream, count, torch.Generator().manual_seed(1000 + seed))
            for name in RATES:
                key = (kind, name)
                train = partial(expert, base, stream, name, seed, steps)
                own = experts[key] = made("expert", kind, name, train, common)
                makes = {
                    "fisher": partial(information, model, own, some, None),
                    "true": partial(information, model, own, some, seed),
                    "adam": partial(adam, own, stream, seed, steps),
                }
                for what, make in makes.items():
                    metrics[(what, *key)] = partial(made, what, kind, name, make, common)
        names = list(RATES)
        shifted = [dict(zip(KINDS, names[k:] + names[:k], strict=True)) for k in range(len(names))]
        uniform = [dict.fromkeys(KINDS, name) for name in names]

        def bits(state: State) -> dict[str, float]:
            return {k: judge(model, held_out, state, k)["bits per byte"] for k in KINDS}

        for trained in [*shifted, *uniform]:
            keys = list(trained.items())
            kinds = set(trained.values())
            yield Contest(
                {
                    "experts": MIXED if len(kinds) > 1 else f"all by {next(iter(kinds))}",
                    "trained": ", ".join(f"{kind} {name}" for kind, name in keys),
                    "seed": seed,
                },
                base,
                [experts[key] for key in keys],
                {
                    title: partial(_all, [metrics[(what, *key)] for key in keys])
                    for title, what in (
                        ("Fisher", "fisher"),
                        ("true Fisher", "true"),
                        ("Adam", "adam"),
                    )
                },
                bits,
                {k: bits(experts[k, n])[k] for k, n in keys},
            )


def information(model: nn.Module, state: State, examples: torch.Tensor, seed: int | None) -> Metric:
    """The diagonal Fisher information of an expert; with a seed, the true one."""
    load_state(model, state)
    return fisher(model, examples, None if seed is None else torch.Generator().manual_seed(seed))


def _all(makes: Sequence[Callable[[], Metric]]) -> list[Metric]:
    return [make() for make in makes]


def fine_tunes(cache: Path, seeds: int, quick: bool) -> Iterator[Contest]:
    """SmolLM2-135M, fine-tuned by AdamW on the same texts."""
    sizes = smollm.Sizes(expert_steps=2, windows=1) if quick else smollm.Sizes()
    count = 1 if quick else SMOLLM_EXAMPLES
    model, tokenizer = smollm.pretrained(cache.parent)
    streams = {k: torch.tensor(tokenizer(load(k).train[:200_000]).input_ids) for k in KINDS}
    for problem in smollm.problems(sizes, SMOLLM, seeds, cache.parent):
        seed = problem.case["seed"]
        metrics = []
        for own in problem.experts:
            smollm.load_state(model, own.state)
            generator = torch.Generator().manual_seed(1000 + seed)
            some = windows(streams[own.task], count, generator, smollm.CONTEXT)
            seen = {"seed": seed, "examples": count, "steps": sizes.expert_steps}
            make = partial(fisher, model, some, None, batch=1)
            metrics.append(cached(cache, f"smollm-fisher-{own.task}", seen, make))

        def bits(state: State, problem: Problem = problem) -> dict[str, float]:
            return {task: own["bits per byte"] for task, own in problem.evaluate(state).items()}

        own = {e.task: problem.judge(e.state, e.task)["bits per byte"] for e in problem.experts}
        states = [expert.state for expert in problem.experts]
        case = {"experts": SMOLLM, "trained": "all AdamW", "seed": seed}
        yield Contest(case, problem.base, states, {"Fisher": partial(list, metrics)}, bits, own)


def measure(contest: Contest, *, weights_only: bool) -> Iterator[Row]:
    """All rows of one contest, or those of merges of the changes from the base."""

    def found(name: str, bits: Mapping[str, float], j: float | None) -> Row:
        result = {"bits": dict(bits), "mean": fmean(bits.values()), "J": j}
        own = row("optimizers", contest.case, name, result)
        own["versions"]["transformers"] = version("transformers")
        return own

    experts = (contest.base, contest.states)
    merges: Iterator[tuple[str, State]] = from_weights(*experts)
    if not weights_only:
        yield found(BASE, contest.bits(contest.base), None)
        yield found(OWN, contest.own, None)
        merges = chain(merges, from_metrics(*experts, contest.metrics))
    fisher_metrics = contest.metrics["Fisher"]()
    for name, state in merges:
        yield found(name, contest.bits(state), objective(state, contest.states, fisher_metrics))


def _values(rows: Sequence[Row], experts: str, name: str, *keys: str) -> list[float]:
    values = []
    for own in rows:
        if own["case"]["experts"] == experts and own["contestant"] == name:
            value: Any = own["result"]
            for key in keys:
                value = value[key]
            values.append(value)
    return values


def _against_linear(rows: Sequence[Row], experts: str, name: str) -> tuple[float, float]:
    pairs = zip(
        _values(rows, experts, name, "mean"), _values(rows, experts, LINEAR, "mean"), strict=True
    )
    rest = [own - linear for own, linear in pairs]
    return fmean(rest), stdev(rest) / math.sqrt(len(rest)) if len(rest) > 1 else math.nan


def table(rows: Sequence[Row]) -> str:
    """A table for each set of experts."""
    parts = []
    for experts in dict.fromkeys(r["case"]["experts"] for r in rows):
        lines = [["", *KINDS, "mean", "- linear", "J / linear's"], ["---", *["---:"] * 6]]
        names = list(
            dict.fromkeys(r["contestant"] for r in rows if r["case"]["experts"] == experts)
        )
        means = {name: fmean(_values(rows, experts, name, "mean")) for name in names}
        best = min((name for name in names if name != OWN), key=means.__getitem__)
        for name in names:
            bits = [f"{fmean(_values(rows, experts, name, 'bits', k)):.4f}" for k in KINDS]
            rest, error = _against_linear(rows, experts, name)
            js = _values(rows, experts, name, "J")
            linear = _values(rows, experts, LINEAR, "J")
            ratio = "" if js[0] is None else f"{fmean(map(truediv, js, linear)):.3f}"
            mark = "**" if name == best else ""
            lines.append(
                [name, *bits, f"{mark}{means[name]:.4f}{mark}", f"{rest:+.4f} ± {error:.4f}", ratio]
            )
        cases = len(_values(rows, experts, LINEAR, "mean"))
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {experts[0].upper()}{experts[1:]}, {cases} sets\n\n{body}\n")
    machine, versions = rows[0]["machine"], rows[0]["versions"]
    circumstances = ", ".join(f"{k} {v}" for k, v in {**machine, **versions}.items())
    return "\n".join(
        [
            "# Experts of different optimizers\n\n"
            "Bits per byte on held-out text, less is better: the demo's three kinds of text and "
            "model (1.3e6 parameters), one expert each, from one base. Three optimizers: each on "
            f"one text, in all three rotations, {SEEDS} seeds; below, all experts by one. Means ± "
            "standard errors of the differences to the linear merge of the same experts. Fisher: "
            f"the empirical one, diagonal, from {EXAMPLES} windows of {WINDOW} bytes of the "
            "expert's own training text; true: with targets drawn from the expert; Adam: sqrt(v) "
            "of an AdamW that saw as many batches as training had, without a step. Even: each "
            "metric scaled to mean one over its model. SmolLM2-135M: three fine-tunes by AdamW, "
            f"Fisher from {SMOLLM_EXAMPLES} windows of {smollm.CONTEXT} tokens. J is the paper's "
            "objective in the Fisher metric. Self: fisher with metric: self. Bold: the best that "
            "is no own expert.\n",
            *parts,
            f"{circumstances}; {rows[0]['when']} to {rows[-1]['when']}.\n",
        ]
    )


def chart(rows: Sequence[Row], path: Path) -> None:
    """Differences to linear, a panel for each set of experts."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    sets = list(dict.fromkeys(r["case"]["experts"] for r in rows))
    names = [
        name
        for name in dict.fromkeys(r["contestant"] for r in rows)
        if name not in (BASE, OWN, LINEAR)
    ]
    figure, panels = pyplot.subplots(
        1, len(sets), figsize=(5 + 2.5 * len(sets), 6), layout="constrained", sharey=True
    )
    for axes, experts in zip(panels, sets, strict=True):
        there = [name for name in names if _values(rows, experts, name, "mean")]
        found = [_against_linear(rows, experts, name) for name in there]
        axes.errorbar(
            [mean for mean, _ in found],
            [names.index(name) for name in there],
            xerr=[error for _, error in found],
            fmt="o",
            capsize=3,
        )
        axes.axvline(0, color="grey", linewidth=1)
        # Long scales of task arithmetic are so bad that nothing else could be told apart.
        axes.set_xlim(right=min(axes.get_xlim()[1], _WORST_SHOWN))
        axes.set_title(experts)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("bits per byte, minus linear's\n(less is better)")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Run all seeds, and write after each set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little training, to see it work")
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="only merges of the changes from the base, which need no metric; keep other rows",
    )
    parser.add_argument("--cache", type=Path, default=_HERE / "quality" / ".cache" / "optimizers")
    parser.add_argument("--out", type=Path, default=_HERE / "optimizers.json")
    options = parser.parse_args()
    rows: list[Row] = []
    for make in (tiny,) if options.weights_only else (tiny, fine_tunes):
        for contest in make(options.cache, 1 if options.quick else SEEDS, options.quick):
            print(dict(contest.case), file=sys.stderr, flush=True)
            rows += measure(contest, weights_only=options.weights_only)
    if options.weights_only:
        made = {(r["case"]["experts"], r["contestant"]) for r in rows}
        rows += [
            r
            for r in json.loads(options.out.read_text())
            if (r["case"]["experts"], r["contestant"]) not in made
        ]
        rows.sort(key=lambda r: r["contestant"] not in (BASE, OWN))
    if not options.quick:
        text = ",\n".join(json.dumps(own) for own in rows)
        options.out.write_text(f"[\n{text}\n]\n")
        options.out.with_suffix(".md").write_text(table(rows))
        chart(rows, options.out.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    main()
