"""granularity: model and origin: base in mergekit's own commands, on real checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from configs import config_for
from conftest import llama, weights_of
from inputs import ambient_mean
from mergekit import graph
from mergekit.io.tasks import LoadTensor
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.scripts.merge_raw_pytorch import SimpleLoadTensor
from safetensors.torch import load_file, save_file
from test_merges import assert_stopped
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def exact_models(tmp_path_factory):
    """Three float32 models and a fourth, their base."""
    folder = tmp_path_factory.mktemp("exact")
    return [llama(folder / name, seed, dtype=torch.float32) for seed, name in enumerate("abcd")]


def flat(model, names):
    return np.concatenate([model[name].double().numpy().ravel() for name in names])


def assert_whole_mean(found, inputs, weights, base=None, counted=None):
    """found is the mean of the models taken as one vector each; counted: names that count."""
    counted = sorted(counted or found)
    zero = {name: torch.zeros(tensor.shape) for name, tensor in found.items()}
    start = flat(base or zero, counted)
    points = [flat(model, counted) - start for model in inputs]
    mean = ambient_mean(points, weights) + start
    np.testing.assert_allclose(flat(found, counted), mean, rtol=0, atol=2e-7)


@pytest.mark.parametrize("options", [[], ["--lazy-unpickle", "--out-shard-size", "10K"]])
@pytest.mark.parametrize("origin", ["zero", "base"])
def test_the_whole_model_is_one_vector(exact_models, merge, origin, options):
    *models, base = exact_models
    weights, around = [1, 2, 0.5], base if origin == "base" else None
    config = config_for(models, weights, around, granularity="model", origin=origin)
    outcome = merge(config, *options)
    start = weights_of(base) if around else None
    assert_whole_mean(outcome.weights, [weights_of(m) for m in models], weights, start)
    assert AutoModelForCausalLM.from_pretrained(outcome.out)
    assert f"{len(outcome.weights)} tensors merged" in outcome.output


def test_a_model_of_weight_zero_takes_no_part(exact_models, merge, tmp_path):
    broken = Path(shutil.copytree(exact_models[2], tmp_path / "broken"))
    for path in broken.glob("*.safetensors"):
        tensors = {
            name: torch.full_like(tensor, torch.nan)
            for name, tensor in weights_of(broken).items()
            if name in load_file(path)
        }
        save_file(tensors, path, metadata={"format": "pt"})
    models = [exact_models[0], str(broken), exact_models[1]]
    outcome = merge(config_for(models, [1, 0, 3], granularity="model"))
    inputs = [weights_of(exact_models[0]), weights_of(exact_models[1])]
    assert_whole_mean(outcome.weights, inputs, [1, 3])


@pytest.mark.parametrize("origin", ["zero", "base"])
def test_slices_of_different_layers(exact_models, merge, origin):
    """Layers 0 and 1 of the result are layers 0, 1 of one model and 1, 2 of the other."""
    first, second, _, base = exact_models
    ranges = {first: [0, 2], second: [1, 3]} | ({base: [0, 2]} if origin == "base" else {})
    sources = [{"model": model, "layer_range": layers} for model, layers in ranges.items()]
    config = config_for([], granularity="model", origin=origin)
    config |= {"slices": [{"sources": sources}]} | (
        {"base_model": base} if origin == "base" else {}
    )
    del config["models"]
    outcome = merge(config)
    names = {name for name in outcome.weights if ".layers." not in name or ".2." not in name}
    assert names == set(outcome.weights)

    def shifted(model, by):
        tensors = weights_of(model)
        return {
            name: tensors[".".join([*p[:2], str(int(p[2]) + by), *p[3:]])]
            if (p := name.split("."))[1] == "layers"
            else tensors[name]
            for name in names
        }

    start = shifted(base, 0) if origin == "base" else None
    assert_whole_mean(outcome.weights, [shifted(first, 0), shifted(second, 1)], [1, 1], start)


def test_slices_without_the_base_are_refused(exact_models, merge):
    first, second, _, base = exact_models
    sources = [{"model": model, "layer_range": [0, 3]} for model in (first, second)]
    config = config_for([], base=base, origin="base") | {"slices": [{"sources": sources}]}
    del config["models"]
    assert_stopped(merge(config), "origin: base", "embed_tokens", "list it among the sources")


def test_tied_heads_count_once(merge, tmp_path):
    """One input has a head of its own, so that the result has one; where all are tied, it counts
    as the embedding does, once."""
    options = {"dtype": torch.float32, "tie_word_embeddings": True}
    tied = [llama(tmp_path / f"t{seed}", seed, **options) for seed in range(2)]
    outcome = merge(config_for(tied, granularity="model"))
    inputs = [weights_of(model) for model in tied]
    assert_whole_mean(outcome.weights, inputs, [1, 1], counted=set(inputs[0]))

    own = llama(tmp_path / "own", 5, dtype=torch.float32)
    mixed = merge(config_for([tied[0], own], granularity="model"), name="mixed")
    with_head = inputs[0] | {"lm_head.weight": inputs[0]["model.embed_tokens.weight"]}
    assert "lm_head.weight" in mixed.weights
    assert_whole_mean(mixed.weights, [with_head, weights_of(own)], [1, 1])


def test_permuted_vocabularies(merge, tmp_path):
    """Tensors are permuted before they count; mergekit gives each model alone so permuted.

    Not for a union: its order may differ from one merge to the next.
    """
    models = [
        llama(tmp_path / f"v{seed}", seed, extra_words=seed + 1, dtype=torch.float32)
        for seed in range(2)
    ]
    tokenizer = {"tokenizer": {"source": models[1]}}
    config = config_for(models) | tokenizer
    permuted = []
    for index in range(2):
        alone = config_for(models, [int(index == 0), int(index == 1)])
        permuted.append(merge(alone | tokenizer, name=f"p{index}").weights)
    config["parameters"] = {"granularity": "model"}
    assert_whole_mean(merge(config).weights, permuted, [1, 1])


def test_lora_inputs(exact_models, merge, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(exact_models[0])
    adapted = get_peft_model(
        base, LoraConfig(target_modules=["up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path / "adapter")
    outcome = merge(
        config_for([f"{exact_models[0]}+{tmp_path / 'adapter'}", exact_models[1]])
        | {"parameters": {"granularity": "model"}},
        "--lora-merge-cache",
        str(tmp_path / "cache"),
    )
    full = adapted.merge_and_unload().state_dict()
    assert_whole_mean(outcome.weights, [full, weights_of(exact_models[1])], [1, 1])


def raw(path, seed, **more):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer{i}": torch.randn(3 + i, 4, generator=generator) for i in range(3)} | more
    save_file(tensors, path)
    return str(path), tensors


def test_raw_checkpoints_with_buffers_of_whole_numbers(merge, tmp_path):
    steps = {"steps": torch.tensor([5])}
    files = [raw(tmp_path / f"{seed}.safetensors", seed, **steps) for seed in range(3)]
    config = config_for([path for path, _ in files], [1, 1, 2], granularity="model")
    outcome = merge(config, command="mergekit-pytorch")
    found = outcome.weights
    assert found.pop("steps").tolist() == [5]
    assert_whole_mean(found, [tensors for _, tensors in files], [1, 1, 2])


@pytest.mark.parametrize("parameters", [{"granularity": "model"}, {"origin": "base"}])
def test_a_tensor_that_an_input_lacks_is_named(merge, tmp_path, parameters):
    (first, _), (second, _) = (raw(tmp_path / f"{s}.safetensors", s) for s in range(2))
    more, _ = raw(tmp_path / "more.safetensors", 3, extra=torch.rand(2))
    config = config_for([second, more], base=first, **parameters)
    outcome = merge(config, "--tensor-union", command="mergekit-pytorch")
    words = ["extra", "leave that model out"] if "granularity" in parameters else ["extra", "zero"]
    assert_stopped(outcome, *words)
    assert not outcome.out.exists()


def test_a_stage_of_mergekit_multi(exact_models, merge):
    first = config_for(exact_models[:2], granularity="model") | {"name": "pair"}
    second = config_for(["pair", exact_models[2]], [2, 1], granularity="model")
    outcome = merge([first, second], command="mergekit-multi")
    inputs = [weights_of(model) for model in exact_models[:3]]
    names = sorted(inputs[0])
    pair = ambient_mean([flat(model, names) for model in inputs[:2]], [1, 1])
    mean = ambient_mean([pair, flat(inputs[2], names)], [2, 1])
    np.testing.assert_allclose(flat(outcome.weights, names), mean, rtol=0, atol=4e-7)


def test_a_stage_called_base_gets_a_hint(exact_models, merge):
    first = config_for(exact_models[:2]) | {"name": "base"}
    second = config_for([exact_models[2]], base="base", origin="base")
    outcome = merge([first, second], command="mergekit-multi")
    assert outcome.exit_code == 1
    assert "name of a stage" in outcome.output


def test_mixed_granularities_and_weights_are_refused_while_planning(exact_models, merge):
    by_filter = [{"filter": "mlp", "value": "model"}, {"value": "row"}]
    outcome = merge(config_for(exact_models[:2], granularity=by_filter))
    assert_stopped(outcome, "both granularity: row and granularity: model")
    by_layer = [{"filter": "mlp", "value": 2}, {"value": 1}]
    outcome = merge(config_for(exact_models[:2], [1, by_layer], granularity="model"))
    assert_stopped(outcome, "different weights", "give one weight for the whole merge")
    assert not outcome.out.exists()


def test_rows_and_filters_in_one_merge(exact_models, merge):
    """granularity and magnitude are parameters like any other."""
    by_filter = [{"filter": "mlp", "value": "row"}, {"value": "tensor"}]
    outcome = merge(config_for(exact_models[:3], granularity=by_filter))
    inputs = [weights_of(model) for model in exact_models[:3]]
    for name, tensor in outcome.weights.items():
        parts = tensor if "mlp" in name else [tensor]
        columns = [model[name] if "mlp" in name else [model[name]] for model in inputs]
        for own, *column in zip(parts, *columns, strict=True):
            expected = ambient_mean([t.double().numpy().ravel() for t in column], [1, 1, 1])
            np.testing.assert_allclose(own.numpy().ravel(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_16_bit_inputs_around_a_base_are_warned_of_once(three_models, merge, granularity, caplog):
    first, second, base = three_models
    config = config_for([first, second], base=base, origin="base", granularity=granularity)
    merge(config)
    assert "arrive as" not in caplog.text
    outcome = merge(config | {"dtype": "bfloat16"}, name="narrow")
    assert outcome.weights
    assert caplog.text.count("arrive as bfloat16") == 1
    assert "dtype: float32 with out_dtype: bfloat16" in caplog.text


def test_a_base_that_takes_part_is_told_once_and_one_that_does_not_is_not(
    exact_models, merge, caplog
):
    *models, base = exact_models
    assert merge(config_for(models, base=base)).weights
    assert caplog.text.count("takes part in the Karcher mean as one more model") == 1
    assert "origin: base" in caplog.text
    caplog.clear()
    assert merge(config_for(models, base=base, origin="base"), name="around").weights
    assert merge(config_for(models), name="none").weights
    assert "one more model" not in caplog.text


def most_tensors_held(schedule):
    """The most loaded tensors that mergekit's executor holds at once, by its own bookkeeping."""
    held, most = set(), 0
    for index, handle in enumerate(schedule.tasks):
        task = handle.task()
        inner = getattr(task, "task", task)
        if isinstance(inner, (LoadTensor, SimpleLoadTensor)):
            held.add(handle)
        most = max(most, len(held))
        held = {other for other in held if schedule.last_use_index[other] > index}
    return most


@pytest.fixture
def executors(monkeypatch):
    """Every executor that a merge makes."""
    made = []
    true_init = graph.Executor.__init__

    def init(self, *args, **kwargs):
        true_init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(graph.Executor, "__init__", init)
    return made


@pytest.mark.parametrize("command", ["mergekit-yaml", "mergekit-pytorch"])
def test_only_one_tensor_of_each_model_is_held(exact_models, merge, executors, tmp_path, command):
    models = exact_models[:3]
    if command == "mergekit-pytorch":
        models = [raw(tmp_path / f"{seed}.safetensors", seed)[0] for seed in range(3)]
    assert merge(config_for(models, granularity="model"), command=command).weights
    executor = max(executors, key=lambda made: len(made.schedule.tasks))
    loads = [h for h in executor.schedule.tasks if "Load" in str(h) or "AfterMean" in str(h)]
    assert len(loads) > 6
    assert most_tensors_held(executor.schedule) == 3


def test_the_multi_gpu_executor_takes_the_plan(exact_models, merge, executors, monkeypatch):
    """Its graph analysis raises on plans that need the main thread in their middle."""
    monkeypatch.setattr("mergekit.multigpu_executor.get_torch_accelerator_type", lambda: "cuda")
    assert merge(config_for(exact_models[:3], granularity="model")).weights
    executor = max(executors, key=lambda made: len(made.schedule.tasks))
    multi = MultiGPUExecutor([handle.task() for handle in executor.targets], num_gpus=2)
    planned = {str(handle) for tasks in multi.gpu_assignments.values() for handle in tasks}
    assert any("ModelMean" in name for name in planned)
    assert any("MergeTensor" in name for name in planned)
