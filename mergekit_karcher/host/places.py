"""Where models are: on this machine, in the cache of the Hub, or on the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import NoReturn

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from mergekit_karcher.errors import KarcherError, first_line
from mergekit_karcher.report.names import RAW_SUFFIXES, is_local

_SECONDS = 10


def check_places(
    references: Iterable[str], *, folder: Path | None = None, cache: str | None = None
) -> None:
    """Raise `KarcherError` for the first model that is nowhere, before anything waits for it.

    Without this, transformers and huggingface_hub ask an unreachable Hub again and again.

    references: paths or Hub ids, with @revision and +adapter or without. folder: that of the config
    that names them. cache: where models from the Hub are kept.
    """
    for reference in references:
        for part in () if os.path.exists(reference) else reference.split("+"):
            path, _, revision = part.partition("@")
            if os.path.exists(path):
                continue
            beside = folder is not None and (folder / path).exists()
            if is_local(path) or beside or path.endswith(RAW_SUFFIXES):
                _refuse_path(path, folder)
            _check_hub(path, revision or None, cache)


def _refuse_path(path: str, folder: Path | None) -> NoReturn:
    expanded = os.path.expanduser(path)
    if expanded != path and os.path.exists(expanded):
        raise KarcherError(f"mergekit reads {path} as it stands: write {expanded} instead.")
    if folder is not None and (folder / path).exists():
        raise KarcherError(
            f"There is no model at {path} from this folder, but there is one from the folder of "
            f"the config: run the command in {folder}, or write the whole path."
        )
    is_whole = os.path.isabs(expanded) or PureWindowsPath(path).is_absolute()
    where = "" if is_whole else f" from {Path.cwd()}, where relative paths begin"
    raise KarcherError(f"There is no model at {path}{where}: check the path.")


def _check_hub(name: str, revision: str | None, cache: str | None) -> None:
    nowhere = f"There is no folder {name} here, and "
    try:
        stored = repo_folder_name(repo_id=name, repo_type="model")
        if not any(Path(root, stored).is_dir() for root in (cache, HF_HUB_CACHE) if root):
            api = huggingface_hub.HfApi()
            if api.model_info(name, revision=revision, timeout=_SECONDS).gated:
                api.auth_check(name)
    except errors.HFValidationError:
        raise KarcherError(f"{nowhere}it is no name that the Hub could have.") from None
    except errors.GatedRepoError:
        raise KarcherError(
            f"{name} is a gated model: ask for access on its page of the Hub, then run hf auth "
            "login."
        ) from None
    except errors.RevisionNotFoundError:
        raise KarcherError(f"{name} has no revision {revision} on the Hub.") from None
    except errors.RepositoryNotFoundError:
        raise KarcherError(
            f"{nowhere}no such model on the Hub, or it is private: check the spelling, or run hf "
            "auth login."
        ) from None
    except Exception as error:
        raise KarcherError(
            f"{nowhere}the Hub cannot be reached ({first_line(error)}): check the path or your "
            "connection."
        ) from None
