"""What an alignment writes: the models, their metrics, a config that merges them, the orders."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache as remembering
from pathlib import Path
from typing import Any

import torch
import yaml

from mergekit_karcher.align.checkpoint import ONE_FILE, Checkpoint
from mergekit_karcher.align.run import Aligned, AlignedModel
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import write_text
from mergekit_karcher.host.documents import IDENTITY, MODEL_KEYS

CONFIG, ALIGNMENT = "config.yml", "alignment.json"

# What mergekit-yaml stops on while it plans, in mergekit 0.1.5.
_NOT_PLANNED = ("bert",)

_START = "# Relative paths begin in the folder where align was run: run mergekit there, too.\n"


def merges_raw(checkpoint: Checkpoint) -> bool:
    """Whether mergekit-pytorch has to merge a model, file by file, and not mergekit-yaml."""
    config = checkpoint.config
    return config is None or config.get("model_type") in _NOT_PLANNED


def check_free(checkpoints: Sequence[Checkpoint], out: Path) -> None:
    """Raise `KarcherError` if `write` would write over something, or what cannot be merged."""
    if merges_raw(checkpoints[0]) and any(sign in str(out) for sign in ' "'):
        raise KarcherError(
            f"mergekit-pytorch stops on paths with a space, as {out} is: choose another --out."
        )
    targets = [checkpoint.target(out) for checkpoint in checkpoints]
    for target in (*targets, out / CONFIG, out / ALIGNMENT):
        if target.exists():
            raise KarcherError(f"{target} exists: name a new folder by --out.")


def write(
    aligned: Aligned, out: Path, config: dict[str, Any] | None, cache: str | None = None
) -> None:
    """Write aligned models, their metrics, alignment.json and config.yml into a folder.

    config.yml is written last: a folder that has it is complete. Its paths begin where out does.
    Models stay where they are if nothing changes any of them. Raises `KarcherError` if a metric
    does not fit its model.

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
    write_text(out / CONFIG, _START + yaml.safe_dump(merging, sort_keys=False))


def _write_models(aligned: Aligned, out: Path) -> list[str]:
    """The paths of the models, once they are written, or where they were if none changes."""
    checkpoints = [model.checkpoint for model in aligned.models]
    raw = any(map(merges_raw, checkpoints))
    if not aligned.changed and not raw:
        return [_as_path(checkpoint.place) for checkpoint in checkpoints]
    if not aligned.changed and all(checkpoint.only_file for checkpoint in checkpoints):
        return [_as_path(checkpoint.only_file or "") for checkpoint in checkpoints]
    paths = []
    for model in aligned.models:

        def changed(name: str, model: AlignedModel = model) -> torch.Tensor:
            if name in aligned.counts:
                return aligned.counts[name].to(model.checkpoint.dtypes[name])
            return model.written(model.checkpoint.read, name)

        config = {}
        key = aligned.specification.width_key
        if model.is_padded and key is not None:
            config[key] = max(s.size for s in aligned.specification.symmetries if s.padding)
        path = model.checkpoint.write(out, changed, model.file_shapes, config, one_file=raw)
        paths.append(_as_path(path / ONE_FILE if raw and path.is_dir() else path))
    return paths


def _as_path(place: str | Path) -> str:
    """How a config says where a file or folder is, so that mergekit takes it for no Hub id."""
    relative = os.path.exists(place) and not os.path.isabs(place)
    return os.path.join(os.curdir, os.path.normpath(place)) if relative else str(place)


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
            out, lambda tensor: model.written(source.read, tensor), model.file_shapes, {}
        )
        return _as_path(path)

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
