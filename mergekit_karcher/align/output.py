"""What an alignment writes: the models, their metrics, a config that merges them, the orders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache as remembering
from pathlib import Path
from typing import Any

import torch
import yaml

from mergekit_karcher.align.checkpoint import Checkpoint
from mergekit_karcher.align.run import Aligned, AlignedModel
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import write_text
from mergekit_karcher.host.documents import IDENTITY, MODEL_KEYS

CONFIG, ALIGNMENT = "config.yml", "alignment.json"


def check_free(checkpoints: Sequence[Checkpoint], out: Path) -> None:
    """Raise `KarcherError` if anything is there that `write` would write."""
    targets = [checkpoint.target(out) for checkpoint in checkpoints]
    for target in (*targets, out / CONFIG, out / ALIGNMENT):
        if target.exists():
            raise KarcherError(f"{target} exists: name a new folder by --out.")


def write(
    aligned: Aligned, out: Path, config: dict[str, Any] | None, cache: str | None = None
) -> None:
    """Write aligned models, their metrics, alignment.json and config.yml into a folder.

    config.yml is written last: a folder that has it is complete. Models stay where they are if
    nothing changes any of them. Raises `KarcherError` if a metric does not fit its model.

    config: the config of mergekit that the models were taken from; config.yml is the same with
        the new models and metrics. None for one that merges the models by karcher.
    cache: where metrics from the Hub are kept; by default where huggingface_hub keeps them.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = _write_models(aligned, out)
    if config is None:
        merging = _karcher_config(aligned.models, paths)
    else:
        references = [model.checkpoint.reference for model in aligned.models]
        places = dict(zip(references, paths, strict=True))
        merging = _moved(config, places, _metric_writer(aligned.models, out, cache))
    write_text(out / ALIGNMENT, aligned.alignment.model_dump_json(by_alias=True) + "\n")
    write_text(out / CONFIG, yaml.safe_dump(merging, sort_keys=False))


def _write_models(aligned: Aligned, out: Path) -> list[str]:
    """The paths of the models, once they are written, or where they were if none changes."""
    if not aligned.changed:
        references = [model.checkpoint.reference for model in aligned.models]
        return [str(Path(r).resolve()) if Path(r).exists() else r for r in references]
    paths = []
    for model in aligned.models:

        def changed(name: str, model: AlignedModel = model) -> torch.Tensor:
            return aligned.counts[name] if name in aligned.counts else model.read(name)

        config = {}
        key = aligned.specification.width_key
        if model.is_padded and key is not None:
            config[key] = max(s.size for s in aligned.specification.symmetries if s.padding)
        path = model.checkpoint.write(out, changed, model.wide.shapes, config)
        paths.append(str(path.resolve()))
    return paths


def _metric_writer(
    models: Sequence[AlignedModel], out: Path, cache: str | None
) -> Callable[[str, str], str]:
    """Writes the metric of a model, both given by their references; returns where it is then."""
    by_reference = {model.checkpoint.reference: model for model in models}

    @remembering
    def write_metric(reference: str, metric: str) -> str:
        model = by_reference[reference]
        if metric == IDENTITY or not model.changed:
            return metric
        name = f"{model.checkpoint.name}-metric"
        others = len([*out.glob(f"{name}*")])
        source = Checkpoint(metric, f"{name}-{others + 1}" if others else name, cache)
        for tensor, shape in source.shapes.items():
            if shape != model.checkpoint.shapes.get(tensor):
                raise KarcherError(
                    f"The metric {metric} does not fit {model.checkpoint.name}: its {tensor} has "
                    f"shape {shape}."
                )
        path = source.write(
            out, lambda tensor: model.arranged(source.read, tensor), model.wide.shapes, {}
        )
        return str(path.resolve())

    return write_metric


def _karcher_config(models: Sequence[AlignedModel], paths: Sequence[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "merge_method": "karcher",
        "models": [{"model": path} for path in paths],
    }
    dtypes = {dtype for model in models for dtype in model.checkpoint.dtypes.values()}
    floating = [str(dtype) for dtype in dtypes if dtype.is_floating_point]
    if len(floating) == 1:
        config["dtype"] = floating[0].removeprefix("torch.")
    return config


def _moved(part: Any, places: Mapping[str, str], write_metric: Callable[[str, str], str]) -> Any:
    """A config with the models in other places, and the metric of each written anew."""
    if isinstance(part, list):
        return [_moved(item, places, write_metric) for item in part]
    if not isinstance(part, dict):
        return part

    def carried(setting: Any) -> Any:
        if isinstance(setting, list):
            return [carried(item) for item in setting]
        if isinstance(setting, dict):
            return {**setting, "value": carried(setting["value"])}
        return write_metric(part["model"], setting)

    result: dict[str, Any] = {
        key: places.get(value, value)
        if isinstance(value, str) and _names_a_model(key, value)
        else _moved(value, places, write_metric)
        for key, value in part.items()
    }
    parameters = part.get("parameters") or {}
    if isinstance(part.get("model"), str) and "metric" in parameters:
        result["parameters"] = {**result["parameters"], "metric": carried(parameters["metric"])}
    return result


def _names_a_model(key: str, value: str) -> bool:
    """Whether a value is a model; words such as base may be names of models, too."""
    is_source = key in ("tokenizer_source", "source") and value not in ("base", "union")
    return key in MODEL_KEYS or is_source
