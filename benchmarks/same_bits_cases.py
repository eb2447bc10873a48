"""The configs that `same_bits.py` runs, and the small checkpoints that they merge."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

Config = dict[str, Any]

# Fields of a config; everything else that a case sets is a parameter of the whole merge.
_FIELDS = {"base_model", "dtype", "out_dtype", "tokenizer", "chat_template", "name", "merge_method"}
_LAYERS = 3


@dataclass(frozen=True)
class Case:
    """One command on one config, on several as stages of mergekit-multi, or on options alone.

    command: `report`, `fisher` and `align` are those of mergekit-karcher. refused: whether it has
    to fail.
    """

    name: str
    config: Config | list[Config] | None
    options: tuple[str, ...] = ()
    command: str = "mergekit-yaml"
    refused: bool = False


def all_cases(folder: Path) -> Iterator[Case]:
    """Make the checkpoints in a folder, then yield the cases that merge them."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    _make_models(folder)
    _make_variants(folder)
    _make_raw_files(folder)
    yield from _merges(folder)
    yield from _geometries(folder)
    yield from _layouts(folder)
    yield from _metrics(folder)
    yield from _raw(folder)
    yield from _reports(folder)
    yield from _preparations(folder)


def _merges(at: Path) -> Iterator[Case]:
    three = [at / name for name in "abc"]
    filtered = [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 2}]
    yield Case("plain", _config(three))
    yield Case("weights", _config(three, weight=[0.5, filtered, "1e-1"]))
    yield Case("weight-zero", _config([*three[:2], at / "nan"], weight=[1, 2, 0]))
    yield Case("nan", _config([*three[:2], at / "nan"]), refused=True)
    yield Case("float16", _config([at / "half0", at / "half1"], dtype="float16"))
    yield Case("float32", _config([at / "tune0", at / "tune1", at / "tune2"], dtype="float32"))
    yield Case("mixed", _config([at / "a", at / "tune0"], dtype=None))
    yield Case("out-dtype", _config(three, dtype="float32", out_dtype="bfloat16"))
    yield Case("strings", _config(three, tol="1e-10", max_iter=999, dtype="float64"))
    yield Case("second-name", _config(three, merge_method="karcher_mean"))
    yield Case("base-joins", _config(three[:2], base_model=str(three[2])))
    yield Case("one", _config(three[:1]))
    yield Case("linear", _config(three, weight=[1, 2, 3], merge_method="linear"))
    shards = ("--lazy-unpickle", "--out-shard-size", "10K", "--num-threads", "1")
    yield Case("shards", _config(three), shards)
    lora = _config([f"{at / 'a'}+{at / 'adapter'}", at / "b"])
    yield Case("lora", lora, ("--lora-merge-cache", "lora-cache"))


def _geometries(at: Path) -> Iterator[Case]:
    tunes = [at / f"tune{index}" for index in range(3)]
    base = {"base_model": str(at / "tune-base"), "origin": "base", "dtype": "float32"}
    row_filter = [{"filter": "mlp", "value": "row"}, {"value": "tensor"}]
    yield Case("row", _config(tunes, granularity="row"))
    yield Case("row-base", _config(tunes, granularity=row_filter, **base, out_dtype="bfloat16"))
    yield Case("model", _config(tunes, weight=[2, 1, 0.5], granularity="model"))
    yield Case("model-base", _config(tunes, weight=[2, 1, 0], granularity="model", **base))
    yield Case("tensor-base", _config(tunes, weight=[3, 1, 1], **base))
    listed = _config([*tunes, base["base_model"]], **base)
    yield Case("listed-base", listed)
    for magnitude in ("linear", "geometric"):
        yield Case(f"tensor-{magnitude}", _config(tunes, magnitude=magnitude))
        for granularity in ("row", "model"):
            settings = {"granularity": granularity, "magnitude": magnitude}
            yield Case(f"{granularity}-base-{magnitude}", _config(tunes, **settings, **base))


def _layouts(at: Path) -> Iterator[Case]:
    tied = [at / "tied0", at / "tied1"]
    words = [at / f"words{index}" for index in range(3)]
    union = {"tokenizer": {"source": "union"}}
    sources = [
        {"model": str(at / name), "layer_range": layers, "parameters": {"weight": weight}}
        for name, layers, weight in (("a", [0, 2], 1), ("b", [1, 3], 2))
    ]
    for granularity in ("tensor", "model"):
        settings = {"granularity": granularity, "dtype": "float32"}
        yield Case(f"tied-{granularity}", _config(tied, **settings))
        yield Case(f"union-{granularity}", _config(words, **settings, **union))
        sliced = _config([], **settings) | {"slices": [{"sources": sources}]}
        del sliced["models"]
        yield Case(f"slices-{granularity}", sliced)
    first = _config([at / "a", at / "b"], weight=[3, 1], name="first")
    yield Case("stages", [first, _config(["first", at / "c"])], command="mergekit-multi")


def _metrics(at: Path) -> Iterator[Case]:
    three, metrics = [at / name for name in "abc"], [str(at / f"metric-{name}") for name in "abc"]
    partly = [{"filter": "mlp", "value": metrics[2]}, {"value": "identity"}]
    base = {"base_model": str(at / "tune-base"), "origin": "base", "dtype": "float32"}
    fisher = {"merge_method": "fisher", "metric": metrics}
    yield Case("fisher", _config(three, **fisher))
    yield Case("fisher-weights", _config(three, **fisher, weight=[1, [0.0, 2.0], 3], floor=0.1))
    yield Case("fisher-floor-zero", _config(three, **fisher, floor=0))
    yield Case("fisher-base", _config(three, **fisher, **base))
    identity = {"merge_method": "fisher", "metric": [*metrics[:2], partly]}
    yield Case("fisher-identity", _config(three, **identity))
    yield Case("fisher-without", _config(three, merge_method="fisher"), refused=True)
    yield Case("metric", _config(three, metric=metrics))
    yield Case("metric-row", _config(three, metric=metrics, granularity="row", floor=1e-3))
    yield Case("metric-model", _config(three, metric=metrics, granularity="model"))
    rows = {"granularity": "row", "magnitude": "linear"}
    yield Case("metric-row-base", _config(three, metric=metrics, **rows, **base))
    yield Case("metric-identity", _config(three, metric=[*metrics[:2], "identity"]))


def _raw(at: Path) -> Iterator[Case]:
    raw = [at / name for name in ("raw0.safetensors", "raw1.pt", "raw2.bin")]
    metrics = [str(at / f"raw-metric{index}.safetensors") for index in range(3)]
    for name, settings in {
        "plain": {"weight": [1, 2, 3]},
        "row": {"granularity": "row"},
        "fisher": {"merge_method": "fisher", "metric": metrics},
        "metric": {"metric": metrics, "granularity": "row"},
    }.items():
        yield Case(f"raw-{name}", _config(raw, **settings), command="mergekit-pytorch")
    raw = [at / f"some{index}.safetensors" for index in range(3)]
    for name, settings in {
        "missing": {"weight": [1, 2, 3]},
        "missing-fisher": {"merge_method": "fisher", "metric": ["identity"] * 3},
    }.items():
        config = _config(raw, **settings, dtype="float32")
        yield Case(name, config, ("--tensor-union",), "mergekit-pytorch")
    odd = [at / f"odd{index}.safetensors" for index in range(3)]
    for granularity in ("tensor", "row"):
        config = _config(odd, weight=[3, 1, 0.5], granularity=granularity, dtype="float32")
        yield Case(f"odd-{granularity}", config, command="mergekit-pytorch")


def _reports(at: Path) -> Iterator[Case]:
    three, metrics = [at / name for name in "abc"], [str(at / f"metric-{name}") for name in "abc"]
    base = {"base_model": str(at / "tune-base"), "origin": "base", "dtype": "float32"}
    linear = {"merge_method": "linear", "weight": [1, 2, 3]}
    for name, settings in {
        "plain": {},
        "row-base": {"granularity": "row", **base},
        "model": {"granularity": "model", "weight": [1, 2, 3]},
        "metric": {"metric": metrics},
        "linear": linear | {"base_model": str(at / "tune-base")},
    }.items():
        yield Case(f"report-{name}", _config(three, **settings), command="report")


def _preparations(at: Path) -> Iterator[Case]:
    text = ("--data", str(at / "text.txt"), "--length", "16", "--examples", "20")
    for name, options in {"empirical": (), "true": ("--true", "--batch-size", "4")}.items():
        yield Case(f"make-{name}-fisher", None, (str(at / "a"), *text, *options), "fisher")
    models = tuple(str(at / name) for name in "abc")
    yield Case("align", None, models, "align")
    yield Case("align-reference", None, (*models, "--reference", models[1]), "align")


def _config(models: list[Any], weight: Any = None, metric: Any = None, **settings: Any) -> Config:
    """Of models and, if any, a weight and a metric for each."""
    fields = {"merge_method": "karcher", "dtype": "bfloat16"}
    fields |= {name: value for name, value in settings.items() if name in _FIELDS}
    entries = [{"model": str(model), "parameters": {}} for model in models]
    for parameter, values in (("weight", weight), ("metric", metric)):
        for entry, value in zip(entries, values or (), strict=False):
            entry["parameters"][parameter] = value
    parameters = {name: value for name, value in settings.items() if name not in _FIELDS}
    return {name: value for name, value in fields.items() if value is not None} | {
        "models": entries,
        "parameters": parameters,
    }


def _make_models(at: Path) -> None:
    """Unrelated models, and fine-tunes of one base."""
    for name in "abc":
        _write_model(at / name)
    for index in range(2):
        _write_model(at / f"half{index}", dtype=torch.float16)
        _write_model(at / f"tied{index}", dtype=torch.float32, tie_word_embeddings=True)
    for index in range(3):
        # One vocabulary is larger: the words of several would come in any order in the union.
        _write_model(at / f"words{index}", ["more", "words"] if index == 2 else None)
    base = _write_model(at / "tune-base", dtype=torch.float32)
    for index in range(3):
        state = {name: t + 1e-3 * torch.randn(t.shape) for name, t in base.state_dict().items()}
        _write_model(at / f"tune{index}", dtype=torch.float32, state=state)


def _write_model(
    folder: Path,
    words: list[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    state: dict[str, torch.Tensor] | None = None,
    **options: Any,
) -> LlamaForCausalLM:
    """A Llama of several shards, random or of a state, with a tokenizer of words of its own."""
    words = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(60)), *(words or [])]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=_LAYERS,
        vocab_size=len(words),
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    model = LlamaForCausalLM(config).to(dtype)
    if state is not None:
        model.load_state_dict(state)
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    return model


def _make_variants(at: Path) -> None:
    """Metrics of three models, a model full of NaN, an adapter, and a text."""
    for name in "abc":
        _map_tensors(at / name, at / f"metric-{name}", lambda t: (3 * torch.randn(t.shape)).exp())
    _map_tensors(at / "c", at / "nan", lambda t: torch.full_like(t, torch.nan))
    (at / "text.txt").write_text(" ".join(f"w{index * 7 % 60}" for index in range(400)))
    model = LlamaForCausalLM.from_pretrained(at / "a", dtype=torch.bfloat16)
    lora = LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(at / "adapter")


def _map_tensors(model: Path, copy: Path, change: Any) -> None:
    shutil.copytree(model, copy)
    for path in copy.glob("*.safetensors"):
        tensors = {name: change(tensor) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


def _make_raw_files(at: Path) -> None:
    for index, suffix in enumerate(("safetensors", "pt", "bin")):
        state = {
            "w": torch.randn(6, 5),
            "conv": torch.randn(4, 3, 2, 2).bfloat16(),
            "b": torch.rand(5).double(),
            "scale": torch.rand(()),
            "steps": torch.tensor(7),
        }
        path = at / f"raw{index}.{suffix}"
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
        metric = {name: torch.rand(t.shape) for name, t in state.items() if name != "steps"}
        save_file(metric, at / f"raw-metric{index}.safetensors")
        names = ["everywhere", "rest"][: 1 if index == 1 else 2]
        some = {name: torch.rand(7, 4) for name in names}
        save_file(some, at / f"some{index}.safetensors")
    # Opposite, parallel and zero tensors, a zero row, and a tensor without elements.
    plus = torch.rand(4, 5)
    rows = plus.clone()
    rows[1] = 0
    for index, sign in enumerate((1.0, -1.0, 1.0)):
        odd = {
            "opposite": sign * plus,
            "parallel": (index + 1) * plus,
            "zero": torch.zeros(3, 3),
            "one-zero": torch.zeros(4, 5) if index == 1 else plus + index,
            "zero-row": rows + (index * torch.rand(4, 5) if index != 1 else 0),
            "tiny": torch.full((3, 2), 1e-30 * (index + 1)),
            "empty": torch.zeros(0, 4),
        }
        odd = {name: tensor.clone() for name, tensor in odd.items()}
        save_file(odd, at / f"odd{index}.safetensors")
