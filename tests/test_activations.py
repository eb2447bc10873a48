"""Metrics from activations: each by its definition, block after block, cut off and resumed."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, write
from conftest import weights_of
from safetensors.torch import load_file, save_file
from small_models import TEXT, WORDS, small_batch, small_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from mergekit_karcher import InputGram, KarcherError
from mergekit_karcher.metrics import activation_run, low_rank
from mergekit_karcher.metrics.activations import activation_metrics
from mergekit_karcher.metrics.blocks import Blocks

KIND = ("--kind", "activations")


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=63, n_positions=32)
    return GPT2LMHeadModel(config).eval()


def moments_of(module, inputs, examples):
    """The metric of a module's weight for one call, summed over tokens, by what the module is."""
    x = inputs[0].double()
    if len(x) == 1:
        x = x.expand(examples, -1)  # positions, which all examples share
    if isinstance(module, (nn.Linear, Conv1D)):
        x = x.flatten(0, -2)
        return {"weight": sum(torch.outer(row, row) for row in x)}
    if isinstance(module, nn.Embedding):
        counts = torch.zeros(len(module.weight), dtype=torch.float64)
        for index in x.long().flatten():
            counts[index] += 1
        return {"weight": counts[:, None].expand(module.weight.shape)}
    if "Norm" in type(module).__name__:
        if isinstance(module, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        eps = getattr(module, "variance_epsilon", None) or module.eps
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return {"weight": x.square().flatten(0, -2).sum(0)}
    if "Experts" in type(module).__name__:
        return experts_of(module, x, inputs[1])
    return router_of(module, x)


def router_of(module, x):
    return {"weight": x.flatten(0, -2).T @ x.flatten(0, -2)}


def experts_of(module, x, chosen):
    """Of each expert, over the tokens that chose it."""
    into = torch.zeros(len(module.gate_up_proj), x.shape[-1], x.shape[-1], dtype=torch.float64)
    inner = module.down_proj.shape[-1]
    between = torch.zeros(len(into), inner, inner, dtype=torch.float64)
    for token, experts in zip(x, chosen, strict=True):
        for expert in experts:
            into[expert] += torch.outer(token, token)
            gate, up = (module.gate_up_proj[expert].double() @ token).chunk(2)
            hidden = module.act_fn(gate) * up
            between[expert] += torch.outer(hidden, hidden)
    return {"gate_up_proj": into, "down_proj": between}


def by_a_plain_loop(model, batches):
    """The metric of each weight by its definition: hooks, and one token after the other."""
    metrics, names = {}, {id(p): name for name, p in model.named_parameters()}
    tokens = sum(ids.numel() for ids in batches)

    def hook(module, inputs, output):
        for leaf, moments in moments_of(module, inputs, len(ids)).items():
            name = names[id(getattr(module, leaf))]
            if isinstance(module, nn.Linear) and names[id(module.weight)] in tables:
                continue
            metrics[name] = metrics.get(name, 0) + moments / tokens

    tables = {names[id(m.weight)] for m in model.modules() if isinstance(m, nn.Embedding)}
    hooks = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if any(p.ndim > 1 or "Norm" in type(module).__name__ for p in module.parameters(False))
    ]
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids)
    for one in hooks:
        one.remove()
    return metrics


def dense(metric):
    return metric.dense if isinstance(metric, InputGram) else metric


@pytest.mark.parametrize("kind", ["llama", "tied", "mixture", "gpt2", "llama classifier"])
def test_each_metric_is_what_its_definition_says(kind):
    model = gpt2() if kind == "gpt2" else small_model(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    if kind == "mixture":
        model.set_experts_implementation("eager")
    batches = [small_batch("llama", 4, length).ids for length in (9, 6)]
    metrics = activation_metrics(model, batches)
    expected = by_a_plain_loop(model, batches)
    assert metrics.keys() == expected.keys()
    for name, metric in metrics.items():
        torch.testing.assert_close(
            dense(metric).double(), expected[name], rtol=1e-5, atol=1e-6, msg=name
        )
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    assert {n for n, _ in model.named_parameters()} == metrics.keys() | biases


def test_many_rows_and_columns_are_the_same_as_few(monkeypatch):
    model = small_model("mixture")
    model.set_experts_implementation("eager")
    batches = [small_batch("llama", 4, 9).ids]
    expected = activation_metrics(model, batches)
    monkeypatch.setattr("mergekit_karcher.metrics.activations._ROWS", 5)
    monkeypatch.setattr("mergekit_karcher.metrics.activations._COLUMNS", 7)
    for name, metric in activation_metrics(model, batches).items():
        torch.testing.assert_close(dense(metric), dense(expected[name]), rtol=1e-5, atol=1e-7)


def test_layers_share_the_gram_of_the_input_that_they_share():
    metrics = activation_metrics(small_model("llama"), [small_batch("llama").ids])
    attention, mlp = "model.layers.0.self_attn.{}_proj.weight", "model.layers.0.mlp.{}_proj.weight"
    q, k, v, o = (dense(metrics[attention.format(letter)]) for letter in "qkvo")
    gate, up = (dense(metrics[mlp.format(name)]) for name in ("gate", "up"))
    assert q is k
    assert q is v
    assert gate is up
    assert len({id(q), id(o), id(gate)}) == 3


def test_a_weight_that_stands_on_the_left():
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.Linear(4, 3, bias=False)

        def forward(self, input_ids):
            self.x = torch.randn(2, 4, 5)
            return self.projection.weight @ self.x

    model = Left()
    metrics = activation_metrics(model, [torch.zeros(2, 5, dtype=torch.long)])
    x = model.x.mT.reshape(10, 4)
    torch.testing.assert_close(dense(metrics["projection.weight"]), x.T @ x / 10)


def test_what_is_not_finite_is_named():
    model = small_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = math.inf
    with pytest.raises(KarcherError, match=r"inputs of model\.layers\.1\.mlp\.down_proj\.weight"):
        activation_metrics(model, [small_batch("llama").ids])


def random_gram(*shape):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(*shape[:-1], 3 * shape[-1], shape[-1], generator=generator)
    # Inputs of real networks have a few large elements.
    rows[..., 0] *= 300
    return rows.mT @ rows


@pytest.mark.parametrize("shape", [(24,), (3, 12)])
def test_factors_of_full_rank_are_the_gram(shape):
    gram = random_gram(*shape)
    factors = low_rank.factored(gram, shape[-1])
    product = factors.factor.mT @ factors.factor + torch.diag_embed(factors.diagonal)
    torch.testing.assert_close(product, gram, rtol=1e-4, atol=1e-4 * float(gram[..., 1, 1].max()))


def test_factors_keep_the_diagonal_and_the_largest_directions():
    gram = random_gram(24).double()
    factor, diagonal = low_rank.factored(gram, 6)
    assert factor.shape == (6, 24)
    assert diagonal.min() >= 0
    torch.testing.assert_close(factor.square().sum(0) + diagonal, gram.diagonal())
    left = torch.linalg.eigvalsh(gram - factor.T @ factor)
    assert left.min() > -1e-6 * left.max()
    # The best rank 6 leaves the seventh eigenvalue; one step of iteration comes near it.
    assert left.max() <= 2 * torch.linalg.eigvalsh(gram)[-7]
    assert torch.equal(low_rank.factored(torch.zeros(4, 4), 1).factor, torch.zeros(1, 4))


def saved(network, text_model, folder):
    """A network beside the tokenizer of a language model."""
    shutil.copytree(text_model, folder)
    for path in Path(folder).glob("*model*"):
        path.unlink()
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "architecture", ["gemma2", "falcon", "qwen3_moe", "deepseek_v3", "opt", "gpt2", "phi3"]
)
def test_block_after_block_is_the_whole_model(architecture, text_model, tmp_path, monkeypatch):
    write(architecture, tmp_path / "random", 0, torch.float32)
    network = ARCHITECTURES[architecture][0].from_pretrained(tmp_path / "random")
    network.resize_token_embeddings(63)
    saved(network, text_model, tmp_path / "network")
    measured = {}
    for way in ("blocks", "whole"):
        if way == "whole":
            monkeypatch.setattr(activation_run, "find_blocks", lambda _: None)
        make(tmp_path / "network", tmp_path / way)
        assert len([*(tmp_path / way).glob("*.safetensors")]) == (3 if way == "blocks" else 1)
        measured[way] = weights_of(tmp_path / way)
    assert measured["blocks"].keys() == measured["whole"].keys()
    for name, tensor in measured["blocks"].items():
        torch.testing.assert_close(tensor, measured["whole"][name], rtol=1e-5, atol=1e-7)


def make(model, out, **changes):
    source = activation_run.Source("text.txt", None, "train", ["text"], "label", 16, 1000, 0)
    Path("text.txt").write_text(WORDS)
    return activation_run.metric_from_activations(
        str(model), out, source._replace(**changes), quiet=True, batch_size=5
    )


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_network_that_does_more_between_its_blocks_is_run_whole(
    text_model, tmp_path, monkeypatch, caplog
):
    make(text_model, tmp_path / "blocks")
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(Blocks, "calls", lambda *_: None)
        make(text_model, tmp_path / "whole")
    assert "cannot be run block after block" in caplog.text
    whole, blocks = weights_of(tmp_path / "whole"), weights_of(tmp_path / "blocks")
    assert whole.keys() == blocks.keys()


def test_blocks_that_are_given_something_else_are_noticed():
    model = small_model("llama")
    (model.model.layers[1]).register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    found = activation_run.find_blocks(model)
    assert found.calls(small_batch("llama").ids) is None


def test_a_run_that_was_cut_off_goes_on_where_it_was(run_fisher, text_model, tmp_path, monkeypatch):
    result = run_fisher(text_model, *KIND, *TEXT, "--out", "undisturbed")
    assert result.exit_code == 0, result.output
    run = Blocks.run

    def cut_off(self, index, *arguments):
        if index == 2:
            raise KeyboardInterrupt
        return run(self, index, *arguments)

    monkeypatch.setattr(Blocks, "run", cut_off)
    result = run_fisher(text_model, *KIND, *TEXT, "--out", "resumed")
    assert result.exit_code == 1
    assert "Stopped after 2 of 4 parts" in result.output
    monkeypatch.setattr(Blocks, "run", run)
    made = {path: path.stat().st_mtime_ns for path in Path("resumed").glob("*.safetensors")}
    assert len(made) == 2
    assert not Path("resumed", "metric.json").exists()
    other = ("--data", "text.txt", "--length", 15, "--quiet")
    result = run_fisher(text_model, *KIND, *other, "--out", "resumed")
    assert "holds an unfinished run with other length" in result.output
    result = run_fisher(text_model, *KIND, *TEXT, "--out", "resumed")
    assert result.exit_code == 0, result.output
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    names = {path.name for path in Path("undisturbed").iterdir()}
    assert {path.name for path in Path("resumed").iterdir()} == names
    # The order of a header's metadata is left to chance.
    for name in names:
        one, other = (Path(folder, name) for folder in ("resumed", "undisturbed"))
        if one.suffix == ".json":
            assert one.read_bytes() == other.read_bytes()
            continue
        tensors = load_file(one)
        assert tensors.keys() == load_file(other).keys()
        assert all(torch.equal(tensor, tensors[n]) for n, tensor in load_file(other).items())


CHANGES = {
    "model.layers.0.mlp.up_proj.weight": "was made of other weights",
    "model.embed_tokens.weight": "holds an unfinished run with other weights",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_changed_meanwhile_is_refused(run_fisher, text_model, monkeypatch, name):
    """Also where it changed outside of the finished blocks, whose inputs are then others."""
    run = Blocks.run

    def cut_off(self, index, *arguments):
        if index == 1:
            raise KeyboardInterrupt
        return run(self, index, *arguments)

    monkeypatch.setattr(Blocks, "run", cut_off)
    run_fisher(text_model, *KIND, *TEXT, "--out", "metric")
    monkeypatch.setattr(Blocks, "run", run)
    for path in Path(text_model).glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] += 1
            save_file(tensors, path, {"format": "pt"})
    result = run_fisher(text_model, *KIND, *TEXT, "--out", "metric")
    assert result.exit_code == 1
    assert CHANGES[name] in result.output


def test_only_one_block_has_weights_at_a_time(text_model, tmp_path, monkeypatch):
    run, loaded = Blocks.run, []

    def watched(self, index, *arguments):
        parameters = self.model.named_parameters()
        loaded.append({n.split(".")[2] for n, p in parameters if "layers" in n and not p.is_meta})
        return run(self, index, *arguments)

    monkeypatch.setattr(Blocks, "run", watched)
    make(text_model, tmp_path / "metric")
    assert set(map(frozenset, loaded)) == {frozenset("0"), frozenset("1"), frozenset("2")}


def test_the_forward_passes_are_those_of_all_examples(run_fisher, text_model, tmp_path):
    """Through the command, against the definition, on windows of the text."""
    result = run_fisher(text_model, *KIND, *TEXT[:-1], "--out", "metric")
    assert result.exit_code == 0, result.output
    assert "13 input Grams of 22 layers, from 400 tokens" in result.output
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32).eval()
    tokens = PreTrainedTokenizerFast.from_pretrained(text_model)(WORDS).input_ids
    expected = by_a_plain_loop(network, [torch.tensor(tokens[:400]).view(-1, 16)])
    metric = weights_of("metric")
    for name in ("model.layers.2.mlp.down_proj.weight", "lm_head.weight"):
        tensor = metric[f"{name}.input_gram"].double()
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)
    counts = metric["model.embed_tokens.weight"]
    assert counts.shape == (63, 1)
    torch.testing.assert_close(
        counts.double().expand(63, 32), expected["model.embed_tokens.weight"]
    )
