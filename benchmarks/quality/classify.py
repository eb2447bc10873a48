"""Image classifiers to merge: experts for eight tasks, and networks trained independently."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from cache import cached
from from_data import WINDOWS, input_grams
from images import PIXELS, Images, Split, data_sets
from problem import Data, Expert, Metrics, Problem, State
from torch import nn

_CLASSES = 10
# What `Data` calls a window.
_WINDOW = 64
_TASKS = 8


@dataclass(frozen=True)
class Training:
    """How long and on what to train; `images` is the number of training images of each task."""

    steps: int
    batch: int
    learning_rate: float
    images: int


@dataclass(frozen=True)
class Sizes:
    """Widths of the trunk, numbers of experts to merge, and how they are trained."""

    widths: Sequence[int]
    expert: Training
    counts: Sequence[int] = (2, 4, 8)
    base: Training = Training(steps=300, batch=32, learning_rate=1e-3, images=2000)


SHORT = Sizes((64, 256, 1024), Training(300, batch=64, learning_rate=5e-4, images=60000))
LONG = Sizes((64, 256), Training(3000, batch=64, learning_rate=1e-3, images=60000))
# For networks that are trained from their initialisation.
SINGLE = Training(1000, batch=64, learning_rate=1e-3, images=60000)


@dataclass(frozen=True)
class Task:
    """A data set whose pixels are in an order of its own."""

    name: str
    images: Images
    order: torch.Tensor

    def batch(self, training: Training, generator: torch.Generator) -> Split:
        """Random training images."""
        train = self.images.train
        some = torch.randint(training.images, (training.batch,), generator=generator)
        return Split(train.images[some][:, self.order], train.labels[some])


def eight_tasks(sizes: Sizes, section: str, seeds: int, cache: Path) -> Iterator[Problem]:
    """One trunk with a fixed head a task: a base trained on all tasks, an expert for each.

    Only the trunk is fine-tuned and merged. With fewer experts the first tasks alone count.
    """
    found = data_sets(cache)
    for width in sizes.widths:
        for seed in range(seeds):
            tasks = _make_tasks(found, seed)
            start = {"width": width, "seed": seed, "data": len(found), "base": asdict(sizes.base)}
            settings = start | {"expert": asdict(sizes.expert)}
            base, *heads = cached(
                cache, "trunk", start, partial(_train_base, tasks, width, seed, sizes.base)
            )
            judges = dict(
                zip([task.name for task in tasks], zip(tasks, heads, strict=True), strict=True)
            )
            experts = [
                Expert(
                    task.name,
                    cached(
                        cache,
                        f"trunk-{task.name}",
                        settings,
                        partial(_train_expert, base, task, head, width, seed, sizes.expert),
                    ),
                )
                for task, head in judges.values()
            ]
            seen = partial(_seen, judges, seed, sizes.expert)
            data = Data(partial(_grams, seen, width), partial(_fisher, judges, seen, width))
            for count in sizes.counts:
                yield Problem(
                    section,
                    {"seed": seed, "width": width, "N": count, "expert_steps": sizes.expert.steps},
                    base,
                    experts[:count],
                    partial(_judge, judges, width),
                    data,
                )


def independent(
    count: int, width: int, training: Training, section: str, seeds: int, cache: Path
) -> Iterator[Problem]:
    """MNIST classifiers trained from an initialisation each, their neurons not aligned."""
    (mnist, *_) = data_sets(cache)
    task = Task(mnist.name, mnist, torch.arange(PIXELS))
    for seed in range(seeds):
        settings = asdict(training) | {"width": width, "count": count}
        whole = [
            cached(
                cache,
                "whole",
                settings | {"seed": member},
                partial(_train_base, [task], width, member, training),
            )
            for member in range(seed * count, (seed + 1) * count)
        ]
        experts = [
            Expert(task.name, trunk | {f"head.{k}": v for k, v in head.items()})
            for trunk, head in whole
        ]
        case = {"seed": seed, "width": width, "N": count}
        yield Problem(section, case, None, experts, partial(_judge_whole, task, width))


def _make_tasks(found: Sequence[Images], seed: int) -> list[Task]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Task(
            f"{images.name} {number // len(found)}",
            images,
            torch.randperm(PIXELS, generator=generator),
        )
        for number in range(_TASKS)
        for images in [found[number % len(found)]]
    ]


def _trunk(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(PIXELS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


def _head(width: int) -> nn.Linear:
    return nn.Linear(width, _CLASSES)


def _fit(
    trunk: nn.Module,
    heads: Sequence[nn.Module],
    tasks: Sequence[Task],
    training: Training,
    seed: int,
    parameters: Sequence[nn.Parameter],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=training.steps
    )
    for _ in range(training.steps):
        batches = [task.batch(training, generator) for task in tasks]
        hidden = trunk(torch.cat([batch.images for batch in batches])).chunk(len(tasks))
        losses = [
            nn.functional.cross_entropy(head(part), batch.labels)
            for head, part, batch in zip(heads, hidden, batches, strict=True)
        ]
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _train_base(tasks: Sequence[Task], width: int, seed: int, training: Training) -> list[State]:
    torch.manual_seed(seed)
    trunk, heads = _trunk(width), [_head(width) for _ in tasks]
    parameters = [p for module in (trunk, *heads) for p in module.parameters()]
    _fit(trunk, heads, tasks, training, seed, parameters)
    return [_state(module) for module in (trunk, *heads)]


def _train_expert(
    base: State, task: Task, head: State, width: int, seed: int, training: Training
) -> State:
    trunk, fixed = _trunk(width), _head(width)
    trunk.load_state_dict(base)
    fixed.load_state_dict(head)
    _fit(trunk, [fixed.requires_grad_(False)], [task], training, seed, list(trunk.parameters()))
    return _state(trunk)


def _state(module: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _seen(
    judges: dict[str, tuple[Task, State]], seed: int, training: Training, task: str, windows: int
) -> Split:
    """The first of the random images that were drawn for measuring, from those of training."""
    own, _ = judges[task]
    generator = torch.Generator().manual_seed(1000 + seed)
    most = replace(training, batch=WINDOWS[-1] * _WINDOW)
    batch = own.batch(most, generator)
    return Split(batch.images[: windows * _WINDOW], batch.labels[: windows * _WINDOW])


def _grams(seen: Callable[[str, int], Split], width: int, expert: Expert, windows: int) -> State:
    trunk = _trunk(width)
    trunk.load_state_dict(expert.state)
    images = seen(expert.task, windows).images
    return input_grams(trunk, lambda: trunk(images))


def _fisher(
    judges: dict[str, tuple[Task, State]],
    seen: Callable[[str, int], Split],
    width: int,
    expert: Expert,
    windows: int,
) -> State:
    """Of a linear layer, an example's squared gradient is the product of two squares."""
    trunk, head = _trunk(width), _head(width)
    trunk.load_state_dict(expert.state)
    head.load_state_dict(judges[expert.task][1])
    split = seen(expert.task, windows)
    passed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hidden = split.images
    for name, layer in trunk.named_children():
        before, hidden = hidden, layer(hidden)
        if isinstance(layer, nn.Linear):
            passed[name] = (before.detach(), hidden)
    loss = nn.functional.cross_entropy(head(hidden), split.labels, reduction="sum")
    gradients = torch.autograd.grad(loss, [after for _, after in passed.values()])
    found = {}
    for (name, (before, _)), gradient in zip(passed.items(), gradients, strict=True):
        squares = gradient.square()
        found[f"{name}.weight"] = squares.T @ before.square() / len(squares)
        found[f"{name}.bias"] = squares.mean(0)
    return found


def _judge(judges: dict[str, tuple[Task, State]], width: int, state: State, name: str) -> Metrics:
    task, head = judges[name]
    return _score(task, width, state, head)


def _judge_whole(task: Task, width: int, state: State, name: str) -> Metrics:
    trunk = {key: value for key, value in state.items() if not key.startswith("head.")}
    head = {key.removeprefix("head."): state[key] for key in state.keys() - trunk.keys()}
    return _score(task, width, trunk, head)


@torch.inference_mode()
def _score(task: Task, width: int, trunk: State, head: State) -> Metrics:
    network = nn.Sequential(_trunk(width), _head(width))
    network[0].load_state_dict(trunk)
    network[1].load_state_dict(head)
    held_out = task.images.held_out
    logits = network(held_out.images[:, task.order])
    right = logits.argmax(1) == held_out.labels
    loss = nn.functional.cross_entropy(logits, held_out.labels).item()
    return {"accuracy": 100 * right.double().mean().item(), "loss": loss}
