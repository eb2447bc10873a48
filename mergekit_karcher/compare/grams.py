"""Input Grams of each model, from windows that nothing is chosen or reported by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_karcher.compare.kept import Kept
from mergekit_karcher.compare.texts import Text
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.metrics.activation_run import metric_from_activations
from mergekit_karcher.metrics.activation_store import is_unfinished
from mergekit_karcher.metrics.examples import Source

# Fewer tokens say too little of a model (docs/evidence.md).
_FEWEST_TOKENS = 1024


def text_of_model(rates: Mapping[str, float], of_base: Mapping[str, float]) -> str:
    """The text on which a model gains most over the base: the nearest to what it was trained on.

    rates, of_base: What the model and the base cost, by text.
    """
    return min(rates, key=lambda name: rates[name] - of_base[name])


@dataclass(frozen=True)
class Grams:
    """The input Grams of some models.

    texts: what those of each model are made from. places: the folder of each model's.
    """

    texts: Mapping[str, Text]
    places: Mapping[str, str]

    def make(self, source: Source) -> None:
        """Make those that are not there.

        Arguments:
            source: How the texts were read.

        Raises:
            KarcherError: If one cannot be made.
        """
        for model, text in self.texts.items():
            place = Path(self.places[model])
            if not place.exists() or is_unfinished(place):
                about = source._replace(data=text.name, most=len(text.spare))
                metric_from_activations(model, place, about, examples=text.spare, quiet=True)


def planned_grams(
    folder: Path, texts: Mapping[str, Text], names: Mapping[str, str], kept: Kept
) -> Grams:
    """Input Grams that are not made yet.

    Arguments:
        folder: Where they will be, each in a folder.
        texts: What those of each model are made from.
        names: A short name of each model.
        kept: Tells models and texts from what they were before.

    Raises:
        KarcherError: If a text has too little beside the windows that are judged on.
    """
    places = {}
    for model, text in texts.items():
        tokens = sum(len(example.ids) for example in text.spare)
        if tokens < _FEWEST_TOKENS:
            raise KarcherError(
                f"Input Grams need {_FEWEST_TOKENS} tokens of {text.name} beside the windows that "
                f"are judged on, and {tokens} are left: give more text, or fewer --windows."
            )
        name = f"{names[model]}-on-{text.name}".replace("/", "-")
        key = kept.key({"model": model, "text": text.name})
        places[model] = str(folder / f"{name}-{key[:8]}")
    return Grams(texts, places)
