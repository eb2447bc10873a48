"""What was measured of each merge, kept so that an interrupted comparison goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit_karcher.compare.judge import Costs, Judge
from mergekit_karcher.compare.texts import Text
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.files import write_text
from mergekit_karcher.host.checkpoints import folders_of
from mergekit_karcher.host.documents import IDENTITY, SELF, metrics_in, named_in
from mergekit_karcher.host.options import decisive
from mergekit_karcher.runner.inputs import Fingerprint, fingerprint

_SCHEMA = 1
_PACKAGES = ("mergekit", "mergekit-karcher", "torch", "transformers")

# What of a model's folder decides how it is merged and judged.
_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer*")


class Kept:
    """The results of one folder, each under a key made of everything that decides it.

    So a change of a model, a config, a text or a version is noticed: what was kept of it no longer
    has the key.

    Arguments:
        folder: Where results are; it must exist.
        texts: What is judged on.
        judge: What judges.
        options: mergekit's `MergeOptions`.
    """

    def __init__(self, folder: Path, texts: Sequence[Text], judge: Judge, options: Any) -> None:
        self._folder, self._cache = folder, options.transformers_cache
        self._common = {
            "schema": _SCHEMA,
            "versions": {package: version(package) for package in _PACKAGES},
            "texts": [text.digest for text in texts],
            "judged": [judge.device, str(judge.dtype)],
            "options": decisive(options),
        }
        self._inputs: dict[str, dict[Path, Fingerprint]] = {}

    def key(self, subject: Mapping[str, Any]) -> str:
        """That of a config, or of anything else that names models.

        Raises:
            KarcherError: If a file of its models or metrics is not whole.
        """
        inputs = {
            str(path): print_of
            for reference in _inputs_of(subject)
            for path, print_of in self._fingerprints(reference).items()
        }
        everything = self._common | {"subject": subject, "inputs": inputs}
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()

    def load(self, key: str, purposes: Sequence[str]) -> Costs | None:
        """What was kept under a key, if all of those purposes are there."""
        path = self._path(key)
        if not path.is_file():
            return None
        costs: dict[str, dict[str, list[float]]] = json.loads(path.read_text(encoding="utf-8"))
        return costs if costs.keys() >= set(purposes) else None

    def keep(self, subject: Mapping[str, Any], costs: Costs) -> None:
        """Keep what was measured.

        Raises:
            KarcherError: If an input has changed meanwhile.
        """
        for reference in _inputs_of(subject):
            for path, before in self._fingerprints(reference).items():
                if fingerprint(path) != before:
                    raise KarcherError(
                        f"{path} has changed while it was compared: run the same command again."
                    )
        write_text(self._path(self.key(subject)), json.dumps(costs))

    def _path(self, key: str) -> Path:
        return self._folder / f"{key[:32]}.json"

    def _fingerprints(self, reference: str) -> dict[Path, Fingerprint]:
        if reference not in self._inputs:
            files = _files_of(reference, self._cache)
            self._inputs[reference] = {path: fingerprint(path) for path in files}
        return self._inputs[reference]


def _inputs_of(subject: Mapping[str, Any]) -> list[str]:
    metrics = [one for one in metrics_in(dict(subject)) if one not in ("", IDENTITY, SELF)]
    return list(dict.fromkeys([*named_in(dict(subject)), *metrics]))


def _files_of(reference: str, cache: str | None) -> Iterable[Path]:
    if Path(reference).is_file():
        return [Path(reference)]
    folders = folders_of(reference, cache)
    return sorted({path for place in folders for name in _FILES for path in place.glob(name)})
