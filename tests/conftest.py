"""Small real models, made once a run, and mergekit's own commands in this process."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.scripts import merge_raw_pytorch, multimerge, run_yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import WORDS, small_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergekit_karcher.cli.main import main
from mergekit_karcher.cli.merge import main as merge_command

COMMANDS = {
    "mergekit-yaml": run_yaml.main,
    "mergekit-multi": multimerge.main,
    "mergekit-pytorch": merge_raw_pytorch.main,
    "mergekit-karcher merge": merge_command,
}


def llama(folder: Path, seed: int, extra_words: int = 0, dtype=torch.bfloat16, **options) -> str:
    """A Llama-type checkpoint of 3 layers in several shards, with a tokenizer; returns its path."""
    torch.manual_seed(seed)
    words = [f"w{index}" for index in range(60)] + [f"m{seed}x{i}" for i in range(extra_words)]
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    config = LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "vocab_size": len(vocabulary),
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | options
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size="20KB")
    fast.save_pretrained(folder)
    return str(folder)


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, by name."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


@dataclass
class Outcome:
    """What a command left behind."""

    exit_code: int
    output: str
    out: Path

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        assert self.exit_code == 0, self.output
        found = weights_of(self.out)
        assert found, "the merge wrote no weights"
        return found


@pytest.fixture(scope="session")
def three_models(tmp_path_factory):
    """Paths of three models of one architecture and vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    return [llama(folder / name, seed) for seed, name in enumerate("abc")]


@pytest.fixture(scope="session")
def close_models(tmp_path_factory):
    """A base and three models near it, in float32: task vectors of 2 % in random directions."""
    folder = tmp_path_factory.mktemp("close")
    base = llama(folder / "base", 0, dtype=torch.float32)
    paths = [base]
    for seed in range(1, 4):
        path = Path(shutil.copytree(base, folder / f"tune{seed}"))
        generator = torch.Generator().manual_seed(seed)
        for file in path.glob("*.safetensors"):
            tensors = {
                name: t
                + 0.02 * t.std(correction=0) * torch.randn(t.shape, generator=generator)
                + (0.01 * torch.randn(t.shape, generator=generator) if t.ndim == 1 else 0)
                for name, t in load_file(file).items()
            }
            save_file(tensors, file, metadata={"format": "pt"})
        paths.append(str(path))
    return paths


@pytest.fixture
def cli(tmp_path):
    """Run our command; returns click's result."""

    def run(*arguments, config=None, **environment):
        arguments = [str(argument) for argument in arguments]
        if config is not None:
            path = tmp_path / "report.yml"
            path.write_text(yaml.safe_dump(config))
            arguments.insert(1, str(path))
        return CliRunner().invoke(main, arguments, env=environment)

    return run


@pytest.fixture
def merge(tmp_path):
    """Run one of mergekit's commands on a config (a dict, or a list of them for stages)."""

    def run(config, *options, command="mergekit-yaml", name="merged") -> Outcome:
        path = tmp_path / f"{name}.yml"
        documents = config if isinstance(config, list) else [config]
        path.write_text(yaml.safe_dump_all(documents))
        out = tmp_path / name
        where = [str(out)]
        if command == "mergekit-multi":
            where = ["--out-path", str(out), "-I", str(tmp_path / "stages")]
        result = CliRunner().invoke(COMMANDS[command], [str(path), *where, *options])
        output = result.output
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            output += f"{type(result.exception).__name__}: {result.exception}"
        return Outcome(result.exit_code, output, out)

    yield run
    logging.getLogger().handlers.clear()  # mergekit's logging keeps the runner's closed streams


@pytest.fixture
def run_fisher(tmp_path, monkeypatch):
    """Run `mergekit-karcher fisher` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        result = CliRunner().invoke(main, ["fisher", *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def text_model(tmp_path):
    """A language model in shards, beside text.txt."""
    (tmp_path / "text.txt").write_text(WORDS)
    return llama(tmp_path / "model", 0, dtype=torch.bfloat16)


@pytest.fixture
def classifier(tmp_path, text_model):
    """A classifier of three named classes, with the tokenizer of the language model."""
    folder = tmp_path / "classifier"
    shutil.copytree(text_model, folder)
    for path in folder.glob("*model*"):
        path.unlink()
    network = small_model("bert classifier")
    network.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    network.config.label2id = {"no": 0, "maybe": 1, "yes": 2}
    network.save_pretrained(folder)
    return "classifier"


def assert_error(result, *words):
    """Whether a command ended in one error with those words, and left nothing that loads."""
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert not hasattr(result, "out") or not (result.out / "model.safetensors").exists()
    (error,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    for word in words:
        assert word in error
