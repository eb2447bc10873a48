"""Two published fine-tunes of one BERT of chemical reactions, from the PyPI package rxnfp."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from from_data import input_grams
from problem import Data, Expert, Metrics, Problem, State
from transformers import BertConfig, BertModel

_PACKAGE = "rxnfp==0.1.0"
_FOLDER = Path("rxnfp/models/transformers")
# 1743 patent reactions with their classes: of Schneider's 50000 those that DRFP got wrong.
_FILE = "drfp-schneider-errors.csv"
_REACTIONS = (
    "https://raw.githubusercontent.com/reymond-group/drfp/"
    f"e0830201662e4c635ffa533c54d540b2dbf5b665/notebooks/{_FILE}"
)
# A third is judged on, and from the next come the inputs of the Grams.
_STRIDE = 3
_LENGTH = 512
_BATCH = 32
_TOKEN = re.compile(r"\[[^\]]+]|Br?|Cl?|>>|%\d\d|[A-Za-z]|\d|[()=#.+/\\:~@?*$|-]")

FINGERPRINTS, CLASSES = "fingerprints", "classes"
_MODELS = {FINGERPRINTS: "bert_ft", CLASSES: "bert_ft_10k_25s"}


def problems(section: str, seeds: int, cache: Path) -> Iterator[Problem]:
    """The one problem that there is, whatever the number of seeds."""
    folder = cache / "reactions"
    site = folder / _FOLDER
    if not site.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*map(str, pip), _PACKAGE], check=True)
    if not (folder / _FILE).is_file():
        urllib.request.urlretrieve(_REACTIONS, folder / _FILE)
    model = BertModel(BertConfig.from_json_file(site / "bert_pretrained" / "config.json")).eval()
    whole = {name: _weights(site / name) for name in ("bert_pretrained", *_MODELS.values())}
    # What the pooler and the classifier do is one expert's alone.
    base = {
        name: tensor
        for name, tensor in whole["bert_pretrained"].items()
        if name.startswith(("embeddings.", "encoder."))
    }
    experts = [
        Expert(task, {name: whole[stem][name] for name in base}) for task, stem in _MODELS.items()
    ]
    vocabulary = (site / _MODELS[CLASSES] / "vocab.txt").read_text().split()
    ids = {token: place for place, token in enumerate(vocabulary)}
    with (folder / _FILE).open() as file:
        rows = list(csv.DictReader(file))
    names = sorted({row[key] for row in rows for key in ("class_gt", "class_pred")})
    tokens = [_tokens(row["smiles"], ids) for row in rows]
    labels = torch.tensor([names.index(row["class_gt"]) for row in rows])
    judge = _Judge(model, whole[_MODELS[CLASSES]], tokens[::_STRIDE], labels[::_STRIDE])
    data = Data(partial(_grams, model, tokens[1::_STRIDE]))
    count = sum(tensor.numel() for tensor in base.values())
    yield Problem(section, {"seed": 0, "parameters": count, "N": 2}, base, experts, judge, data)


class _Judge:
    """Accuracy of the classifier, and of the class of the reaction with the nearest fingerprint."""

    def __init__(
        self,
        model: BertModel,
        head: State,
        reactions: Sequence[Sequence[int]],
        labels: torch.Tensor,
    ) -> None:
        self._model, self._head = model, head
        self._reactions, self._labels = reactions, labels
        self._last: tuple[State, torch.Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, state: State, task: str) -> Metrics:
        # Both tasks look at the same outputs, which take longest.
        if self._last is None or self._last[0] is not state:
            _load(self._model, state)
            self._last = (state, _first_outputs(self._model, self._reactions))
        first = self._last[1]
        if task == CLASSES:
            head = self._head
            pooled = torch.tanh(first @ head["pooler.dense.weight"].T + head["pooler.dense.bias"])
            found = (pooled @ head["classifier.weight"].T + head["classifier.bias"]).argmax(1)
        else:
            unit = torch.nn.functional.normalize(first, dim=1)
            found = self._labels[(unit @ unit.T).fill_diagonal_(-1).argmax(1)]
        return {"accuracy": 100 * (found == self._labels).double().mean().item()}


def _weights(folder: Path) -> State:
    state: State = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    return {name.removeprefix("bert."): tensor for name, tensor in state.items()}


def _load(model: BertModel, state: State) -> None:
    missing = set(model.state_dict()) - set(state)
    if any(not name.startswith("pooler.") for name in missing):
        raise ValueError(f"weights are missing: {sorted(missing)}")
    model.load_state_dict(state, strict=False)


def _tokens(smiles: str, ids: dict[str, int]) -> list[int]:
    found = [ids.get(token, ids["[UNK]"]) for token in _TOKEN.findall(smiles)]
    return [ids["[CLS]"], *found[: _LENGTH - 2], ids["[SEP]"]]


def _first_outputs(model: BertModel, reactions: Sequence[Sequence[int]]) -> torch.Tensor:
    """Outputs at the first token of each, (reactions, width)."""
    order = sorted(range(len(reactions)), key=lambda place: len(reactions[place]))
    result = torch.empty(len(reactions), model.config.hidden_size)
    for start in range(0, len(order), _BATCH):
        places = order[start : start + _BATCH]
        rows = [torch.tensor(reactions[place]) for place in places]
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        # No token of a reaction is the padding, 0.
        hidden = model(input_ids=batch, attention_mask=(batch != 0).long()).last_hidden_state
        result[places] = hidden[:, 0]
    return result


def _grams(model: BertModel, reactions: Sequence[Sequence[int]], own: Expert, count: int) -> State:
    _load(model, own.state)
    seen = [torch.tensor([reaction]) for reaction in reactions[:count]]
    return input_grams(model, lambda: [model(input_ids=some) for some in seen])
