"""Three kinds of text that every CPython install has, split into training and held-out parts."""

import random
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

TRAIN_CHARS = 500_000
HELD_OUT_CHARS = 12_288


class Text(NamedTuple):
    """One kind of text; no paragraph of ``held_out`` is in ``train``."""

    train: str
    held_out: str


def code() -> list[str]:
    """Paragraphs of the standard library's public single-file modules, in order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    public = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))
    files = [folder / f"{name}.py" for name in public]
    return _paragraphs(file.read_text(encoding="utf-8") for file in files if file.is_file())


def manual() -> list[str]:
    """Paragraphs of the language reference that ``help()`` prints, in order of their topics."""
    return _paragraphs(topics[name] for name in sorted(topics))


def names() -> list[str]:
    """Names of Unicode characters, one a line, shuffled: neighbours differ in one word only."""
    found = [(point, unicodedata.name(chr(point), "")) for point in range(sys.maxunicode + 1)]
    # Ideographs and syllables are named by rule: tens of thousands of lines, nothing to learn.
    lines = [
        f"{name}\n"
        for point, name in found
        if name and f"-{point:X}" not in name and not name.startswith("HANGUL SYLLABLE")
    ]
    random.Random(0).shuffle(lines)
    return lines


KINDS: dict[str, Callable[[], list[str]]] = {"code": code, "manual": manual, "names": names}


def load(kind: str) -> Text:
    """Return the start of one kind of text to train on, and its end to evaluate on.

    Held-out text comes from the last tenth of the paragraphs. A paragraph that occurs more than
    once, whatever its line breaks and indentation, is kept at its first place only: topics of the
    manual contain each other.
    """
    pieces: dict[str, str] = {}
    for piece in KINDS[kind]():
        pieces.setdefault(" ".join(piece.split()), piece)
    unique = list(pieces.values())
    split = len(unique) * 9 // 10
    return Text("".join(unique[:split])[:TRAIN_CHARS], "".join(unique[split:])[-HELD_OUT_CHARS:])


def _paragraphs(documents: Iterable[str]) -> list[str]:
    return [f"{piece}\n\n" for document in documents for piece in document.split("\n\n")]
