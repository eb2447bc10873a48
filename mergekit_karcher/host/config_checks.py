"""What mergekit would read otherwise than a config means it, or not at all.

mergekit's config models drop keys that they do not have, and its filters may match nothing: so a
misplaced weight would be a weight of one, without a word.
"""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Union, get_args, get_origin

from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.merge_methods.base import MergeMethodSpec
from pydantic import BaseModel

from mergekit_karcher.errors import KarcherError

# `name` is what mergekit-multi calls a stage; no merge reads `residual_weight`.
_READ_ELSEWHERE = {"name"}
_NEVER_READ = {"residual_weight"}

# The fields of a config below which more parameters may stand.
_NESTED = ("models", "slices", "sources", "modules")


class Setting(NamedTuple):
    """A parameter as a config sets it; of_model: whether its place is that of a model."""

    name: str
    value: Any
    place: str
    of_model: bool


def check_keys(document: Any, kind: type[BaseModel], spec: MergeMethodSpec) -> None:
    """Check that mergekit reads every key of a config.

    Arguments:
        document: The config as a mapping, before mergekit has validated it.
        kind: mergekit's model of it.
        spec: The parameters of the merge method that it asks for.

    Raises:
        KarcherError: For the first key that nothing reads, with the place where it belongs.
    """
    for key, place, known in _unread(document, kind, "the config", top=True):
        shared = {parameter.name for parameter in spec.shared_parameters}
        below = place if key not in shared or place == "the config" else "the config or of a slice"
        where = f"mergekit does not read {key} directly under {place}"
        near = difflib.get_close_matches(key, known, n=1)
        if key in {parameter.name for parameter in spec.parameters}:
            raise KarcherError(f"{where}: it belongs under the parameters of {below}.")
        if near:
            raise KarcherError(f"{where}: did you mean {near[0]}?")
        if key in kind.model_fields:
            raise KarcherError(f"{where}: it belongs to the top level of the config.")
        if key in MergeConfiguration.model_fields:
            raise KarcherError(f"{where}: mergekit-yaml and mergekit-multi do.")
        raise KarcherError(f"{where}: remove it, or take one of {', '.join(sorted(known))}.")


def _unread(
    value: Any, annotation: Any, place: str, *, top: bool = False
) -> Iterator[tuple[str, str, set[str]]]:
    """The keys that a model of pydantic would drop: each with its place, and what is read there."""
    choices = _choices(annotation)
    if isinstance(value, list):
        for item in (get_args(choice)[0] for choice in choices if get_origin(choice) is list):
            for index, element in enumerate(value):
                yield from _unread(element, item, _place(element, f"{place}[{index}]"))
    if not isinstance(value, Mapping):
        return
    for item in (get_args(choice)[1] for choice in choices if get_origin(choice) is dict):
        for key, element in value.items():
            yield from _unread(element, item, f"{key} of {place}")
    models = [c for c in choices if inspect.isclass(c) and issubclass(c, BaseModel)]
    fields = {name: field for model in models for name, field in model.model_fields.items()}
    for key, element in value.items() if models else ():
        if key in fields and not (key in _NEVER_READ and element is not None):
            below = key if place == "the config" else f"{key} of {place}"
            yield from _unread(element, fields[key].annotation, below)
        elif not (top and key in _READ_ELSEWHERE):
            yield key, place, fields.keys() - _NEVER_READ


def _choices(annotation: Any) -> list[Any]:
    """The members of a union, whatever it is nested in."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for member in get_args(annotation) for choice in _choices(member)]
    return [annotation]


def _place(element: Any, index: str) -> str:
    model = element.get("model") if isinstance(element, Mapping) else None
    return model if isinstance(model, str) else index


def settings_in(part: Any, place: str = "the config") -> Iterator[Setting]:
    """Every parameter that a config of mergekit sets."""
    for name, value in (getattr(part, "parameters", None) or {}).items():
        yield Setting(name, value, place, hasattr(part, "model"))
    for field in _NESTED:
        children = getattr(part, field, None) or ()
        named = children.items() if isinstance(children, dict) else enumerate(children)
        for key, child in named:
            model = getattr(child, "model", None)
            yield from settings_in(child, str(model) if model else f"{field}[{key}]")


def check_settings(config: Any, spec: MergeMethodSpec) -> None:
    """Check the parameters and slices of a config, before it is planned.

    Arguments:
        config: A config of mergekit-yaml or mergekit-pytorch.
        spec: The parameters of our method that it asks for.

    Raises:
        KarcherError: For a parameter that the method does not know, or does not read there; for a
            list that stands for no gradient; for entries behind one that has no filter; for
            a slice without layers or with one model twice.
    """
    known = [parameter.name for parameter in spec.parameters]
    of_a_model = [parameter.name for parameter in spec.input_parameters]
    for name, value, place, of_model in settings_in(config):
        if of_model and name in known and name not in of_a_model:
            raise KarcherError(
                f"{name} stands under {place}, where mergekit does not read it: it belongs to the "
                "whole merge, under the parameters of the config or of a slice."
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known)}."
            raise KarcherError(f"Unknown parameter {name} of {place} for {spec.name}: {hint}")
        (parameter,) = [parameter for parameter in spec.parameters if parameter.name == name]
        _check_values(name, value, place, words=isinstance(parameter.default, str))
    _check_listed_once([model.model for model in getattr(config, "models", None) or ()])
    for part in _slices_in(config):
        _check_listed_once([source.model for source in part.sources])
        for source in part.sources:
            first, last = source.layer_range
            if not 0 <= first < last:
                raise KarcherError(
                    f"layer_range: [{first}, {last}] of {source.model} has no layers: give the "
                    "first layer, from 0, and the one after the last."
                )


def check_modules(config: Any, known: Iterable[str]) -> None:
    """Raise `KarcherError` if a config names a module that is not among those of its models."""
    for module in config.modules or ():
        if module not in known:
            raise KarcherError(
                f"modules: {module} is none of the modules of this architecture, which are "
                f"{', '.join(sorted(known))}."
            )


def _check_listed_once(models: Sequence[Any]) -> None:
    for model in models:
        if models.count(model) > 1:
            raise KarcherError(
                f"{model} is listed {models.count(model)} times, which mergekit refuses: list it "
                f"once, with a weight of {models.count(model)}."
            )


def _check_values(name: str, value: Any, place: str, *, words: bool) -> None:
    entries = _entries(value)
    if isinstance(value, list) and not value:
        raise KarcherError(f"{name} of {place} is an empty list: give it a value or remove it.")
    for index, entry in enumerate(entries):
        if words and isinstance(entry.value, list):
            raise KarcherError(
                f"{name} of {place} is a list, which means a gradient over the layers, and only "
                "numbers have one: give one value, or one for each filter."
            )
        if isinstance(entry.value, list) and not entry.value:
            raise KarcherError(f"{name} of {place} is an empty list: give it a value or remove it.")
        if entry.filter in (None, "*") and index + 1 < len(entries):
            raise KarcherError(
                f"{name} of {place} has an entry without a filter before others, which are never "
                "read: put it last."
            )


def _entries(value: Any) -> list[ConditionalParameter]:
    """The values of a setting, each with its filter."""
    if isinstance(value, ConditionalParameter):
        return [value]
    if isinstance(value, list) and value and isinstance(value[0], ConditionalParameter):
        return value
    return [ConditionalParameter(value=value)]


def _slices_in(config: Any) -> Iterator[Any]:
    yield from getattr(config, "slices", None) or ()
    for module in (getattr(config, "modules", None) or {}).values():
        yield from module.slices or ()


def check_filters(settings: Iterable[Setting], names: Sequence[str]) -> None:
    """Check that each filter of a config matches a tensor.

    Arguments:
        settings: The parameters that the config sets.
        names: What the tensors of its merge are called, in the models and in the output.

    Raises:
        KarcherError: For the first filter that matches none.
    """
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    for name, value, place, _ in settings:
        for part in {entry.filter for entry in _entries(value)} - {None, "*", ""}:
            if not any(part in tensor for tensor in names):
                near = difflib.get_close_matches(part, parts, n=1)
                hint = f": did you mean {near[0]}?" if near else ", such as " + parts[0] + "."
                raise KarcherError(
                    f"filter: {part} of {name} in {place} matches no tensor; a filter is a part of "
                    f"the names of tensors, without wildcards{hint}"
                )
