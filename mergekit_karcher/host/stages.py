"""The merges that a config file holds, in the order in which they can be done."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.documents import read_documents


class Stage(NamedTuple):
    """A merge: what it is called, None for the last one, and its config as YAML text."""

    name: str | None
    source: str


def read_stages(path: Path, intermediate: Path | None) -> list[Stage]:
    """Read a config of mergekit-yaml or of mergekit-multi.

    Arguments:
        path: The file.
        intermediate: Where the stages that have a name go, by which others take them as models.

    Returns:
        The merges, each after those that it takes models from. One that is alone keeps its text.

    Raises:
        KarcherError: If it is no such config, or stages take models from each other in a circle.
    """
    documents = read_documents(path)
    if len(documents) == 1 and "name" not in documents[0]:
        return [Stage(None, path.read_text(encoding="utf-8"))]
    from mergekit.scripts.multimerge import load_config

    try:
        configs, needed = load_config(yaml.safe_dump_all(documents), str(intermediate or "."))
    except ValueError as error:
        raise KarcherError(f"{path} is no config of mergekit-multi: {error}.") from None
    stages: dict[str | None, Stage] = {}
    while len(stages) < len(configs):
        ready = [name for name in configs if name not in stages and needed[name] <= set(stages)]
        if not ready:
            circle = ", ".join(sorted(str(name) for name in set(configs) - set(stages)))
            raise KarcherError(f"These stages take models from each other in a circle: {circle}.")
        stages |= {name: Stage(name, configs[name].to_yaml()) for name in ready}
    return list(stages.values())
