"""Rows as markdown: for each set and size a table with a line for each contestant."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from contestants import OWN
from rows import Row
from summary import BETTER, Group, groups

GEOMETRY = "geometry"

_FORMATS = {"accuracy": ".2f", "loss": ".4f", "bits per byte": ".4f"}

# With more tasks than this only their mean is shown.
_MOST_TASKS = 3

_SETS = {
    "demo": "Bits per byte on held-out text, less is better. Three tiny Llama experts, from one "
    "base, on three kinds of text, as `make demo` trains them, but in float32.",
    "demo, larger": "Bits per byte on held-out text, less is better. As the demo, layers twice as "
    "wide.",
    "demo, long": "Bits per byte on held-out text, less is better. The demo's bases, experts "
    "trained five times as long.",
    "SmolLM2-135M": "Bits per byte on held-out text, less is better. SmolLM2-135M-Instruct, "
    "dequantised from 4 bits to float32, fine-tuned on the demo's three kinds of text.",
    "SmolLM2-135M, LoRA": "Bits per byte on held-out text, less is better. The same three kinds of "
    "text, but fine-tunes of rank 8 in every linear layer, merged into the weights.",
    "SmolLM2-135M, genres": "Bits per byte on held-out text, less is better. The same model, "
    "fine-tuned in 40 steps at a learning rate of 2e-5 on genres of the Brown corpus, the first N "
    "of its own order: reportage, editorial, reviews, religion, hobbies, lore, belles lettres, "
    "government, learned, fiction. Held out are the starts of the last six documents of each.",
    "eight tasks": "Means over the tasks that were merged: MNIST and Fashion-MNIST in turn, each "
    "with its pixels in an order of its own. The base, a trunk of two layers under a head for each "
    "task, saw 2000 images of every task; an expert is the trunk after 300 steps on all 60000 of "
    "one task, under the same heads. The trunks are merged. With fewer experts than eight the "
    "first tasks alone count.",
    "eight tasks, long": "The same bases, experts trained for 3000 steps with twice the learning "
    "rate.",
    "reactions": "Accuracy, more is better. Two published fine-tunes of one BERT of chemical "
    "reactions (rxnfp), on 581 reactions: of the one, the class of the reaction with the nearest "
    "fingerprint is taken, of the other that of its classifier, whose head and pooler stay as they "
    "are. These models have no seeds.",
    "different initialisations": "MNIST classifiers with two hidden layers, each trained from an "
    "initialisation of its own, neurons not aligned.",
}
_INTRODUCTION = """# Quality of merged models

Mean over seeds ± its standard error. "- linear" is the difference to the linear merge of the same
experts, seed by seed, so that what the seeds have in common cancels. Bold: the best that is not an
own expert (the mark that no merge is expected to reach). Lambda: that of the task arithmetic
nearest to the merge, base + lambda * (sum of task vectors); linear has 1/N. The lambdas of task
arithmetic were not chosen on other data than what is shown, so its best line is optimistic.
`karcher G, O`: this package with granularity G and origin O; where no length is named it is
arithmetic. `self`: its `fisher` with `metric: self`. Iso-C and TSV-M: short references at scale 1.
`ties` and `dare_ties`: mergekit's at a density of 0.2. `input Grams`: `fisher` in the second
moments of each linear layer's inputs over 4, 16 or 64 windows of the expert's own training data
(64 images are a window); alpha: off-diagonal entries times that, and a ridge of 0.0001. Diagonal
Fisher: from the same windows, an example at a time.
"""


def markdown(rows: Iterable[Row]) -> str:
    """All sets that have rows."""
    found = list(rows)
    parts = []
    for name in dict.fromkeys(row["section"] for row in found):
        mine = [row for row in found if row["section"] == name]
        parts += [f"## {name[0].upper()}{name[1:]}\n\n{_SETS[name]}\n", *map(_table, groups(mine))]
        parts.append(f"{_circumstances(mine)}\n")
    return "\n".join([_INTRODUCTION, *parts])


def _table(group: Group) -> str:
    contestants = [name for name in group.results if name != GEOMETRY]
    single = [("tasks", task, metric) for task in group.tasks for metric in group.metrics]
    columns = single if 1 < len(group.tasks) <= _MOST_TASKS and len(group.metrics) == 1 else []
    header = ["", *(task for _, task, _ in columns)]
    for metric in group.metrics:
        header += [metric, "- linear"]
    header.append("lambda")
    best = {metric: _best(group, metric) for metric in group.metrics}
    lines = []
    for name in contestants:
        line = [name, *(f"{group.estimate(name, *keys).mean:.4f}" for keys in columns)]
        for metric in group.metrics:
            mark = "**" if name == best[metric] else ""
            spec = _FORMATS[metric]
            line.append(f"{mark}{group.estimate(name, 'mean', metric):{spec}}{mark}")
            line.append(f"{group.minus_linear(name, 'mean', metric):{spec}}")
        known = group.has(name, "effective_lambda")
        line.append(f"{group.estimate(name, 'effective_lambda').mean:.3f}" if known else "")
        lines.append(line)
    rule = ["---"] * len(header)
    body = "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])
    case = ", ".join(f"{key} {value}" for key, value in group.case.items())
    return f"### {case}\n\n{_geometry(group)}\n\n{body}\n"


def _best(group: Group, metric: str) -> str:
    candidates = [name for name in group.results if name not in (GEOMETRY, OWN)]
    return BETTER[metric](candidates, key=lambda name: group.estimate(name, "mean", metric).mean)


def _geometry(group: Group) -> str:
    def mean(key: str) -> float:
        return group.estimate(GEOMETRY, key).mean

    text = (
        f"{len(group.results[GEOMETRY])} seeds. Angles between experts, tensor by tensor: median "
        f"{mean('angle_median'):.1f}, largest {mean('angle_largest'):.1f} degrees."
    )
    if group.has(GEOMETRY, "task_cosine"):
        text += (
            f" Task vectors: mean cosine {mean('task_cosine'):.3f}; their mean keeps "
            f"{mean('length_kept'):.3f} of their length."
        )
    return text


def _circumstances(rows: Sequence[Row]) -> str:
    places = {json.dumps(row["machine"] | row["versions"]) for row in rows}
    lines = [
        ", ".join(f"{key} {value}" for key, value in json.loads(place).items())
        for place in sorted(places)
    ]
    return "; ".join([*lines, f"{rows[0]['when']} to {rows[-1]['when']}"]) + "."
