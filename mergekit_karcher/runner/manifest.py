"""What a merge that was begun is a merge of, so that only the same one goes on with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import write_text
from mergekit_karcher.host.merging import Recipe
from mergekit_karcher.host.options import decisive
from mergekit_karcher.host.planned import PlannedMerge
from mergekit_karcher.runner.inputs import fingerprint

_FILE = "manifest.json"
_SCHEMA = 1

# What is compared, and what it is called where it differs.
_COMPARED = {
    "schema": "the layout of its folder",
    "versions": "the versions of the packages",
    "config": "the config",
    "options": "the options",
    "inputs": "the input files",
    "units": "the plan",
}


def config_hash(recipe: Recipe) -> str:
    """The SHA-256 of a config's text."""
    return hashlib.sha256(recipe.source.encode()).hexdigest()


def manifest_of(recipe: Recipe, merge: PlannedMerge) -> dict[str, Any]:
    """All that decides which bytes come of a merge, as it is stored.

    Raises:
        KarcherError: If an input file is not whole.
    """
    packages = ("mergekit", "mergekit-karcher", "torch", "transformers")
    return {
        "schema": _SCHEMA,
        "versions": {package: version(package) for package in packages},
        "config": config_hash(recipe),
        "options": decisive(recipe.options),
        "inputs": {str(path): list(fingerprint(path)) for path in merge.input_files()},
        "units": [[unit.name, len(unit.places), unit.bytes] for unit in merge.units],
    }


def stored_manifest(folder: Path) -> dict[str, Any]:
    """That of the merge that was begun in a folder."""
    manifest: dict[str, Any] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    return manifest


def check_inputs(manifest: Mapping[str, Any], only: Iterable[Path] | None = None) -> None:
    """Raise `KarcherError` for the first input file that is no longer what it was.

    only: the files to look at; None for all.
    """
    for path in manifest["inputs"] if only is None else sorted(map(str, only)):
        if list(fingerprint(Path(path))) != manifest["inputs"][path]:
            raise KarcherError(
                f"{path} has changed while it was merged: run the same command with --overwrite to "
                "begin anew."
            )


def begin_or_go_on(manifest: Mapping[str, Any], folder: Path) -> None:
    """Store a manifest, or compare it with the one that is stored.

    Arguments:
        manifest: Of the merge that is to run.
        folder: Where what is done of it is kept.

    Raises:
        KarcherError: If another merge was begun there, or its inputs have changed.
    """
    path = folder / _FILE
    if not path.is_file():
        write_text(path, json.dumps(manifest, indent=1))
        return
    begun = stored_manifest(folder)
    for key, words in _COMPARED.items():
        if begun.get(key) != manifest[key]:
            raise KarcherError(
                f"{folder.parent} holds the beginning of another merge: {words} differed"
                f"{_where(begun.get(key), manifest[key])}; run that one to its end, or begin anew "
                "with --overwrite."
            )


def _where(before: Any, now: Any) -> str:
    """The first key under which two values differ, for a sentence."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return ""
    keys = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    return f" ({keys[0]})" if keys else ""
