"""Every shipped example runs, with small models in the place of those it names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import llama, weights_of
from safetensors.torch import save_file

EXAMPLES = sorted((Path(__file__).parent.parent / "example_configs").glob("*.yml"))
COMMANDS = {"stages": "mergekit-multi", "pytorch": "mergekit-pytorch"}


class Stand:
    """Makes a small model, adapter or raw checkpoint for each name that a config has."""

    def __init__(self, folder):
        self.folder = folder
        self.made = {}

    def __getitem__(self, name):
        if name not in self.made:
            self.made[name] = self._make(self.folder / f"m{len(self.made)}", name)
        return self.made[name]

    def _make(self, path, name):
        seed = len(self.made)
        if name.endswith(".safetensors"):
            generator = torch.Generator().manual_seed(seed)
            path = path.with_suffix(".safetensors")
            save_file({"layer.weight": torch.randn(4, 3, generator=generator)}, path)
            return str(path)
        if "adapter" in name:
            return self._adapter(path, seed)
        if name.endswith("-fisher"):
            path.mkdir()
            metric = {n: t.float() ** 2 for n, t in weights_of(llama(path / "m", seed)).items()}
            save_file(metric, path / "model.safetensors")
            return str(path)
        return llama(path, seed)

    def _adapter(self, path, seed):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(llama(path / "base", 0), dtype=torch.bfloat16)
        settings = LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
        get_peft_model(base, settings).save_pretrained(path)
        shutil.rmtree(path / "base")
        return str(path)


def replaced(value, stand, stages):
    """The config with every model name replaced, those of stages left alone."""
    if isinstance(value, list):
        return [replaced(item, stand, stages) for item in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, item in value.items():
        names_a_model = key in ("model", "base_model", "metric") or (
            key == "source" and "/" in item
        )
        if names_a_model and item not in (*stages, "self"):
            result[key] = "+".join(stand[part] for part in item.split("+"))
        else:
            result[key] = replaced(item, stand, stages)
    return result


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, merge, tmp_path):
    assert path.read_text().startswith("# ")
    documents = list(yaml.safe_load_all(path.read_text()))
    stages = {document.get("name") for document in documents}
    config = replaced(documents, Stand(tmp_path), stages)
    options = ["--lora-merge-cache", str(tmp_path / "cache")] if path.stem == "lora" else []
    outcome = merge(config, *options, command=COMMANDS.get(path.stem, "mergekit-yaml"))
    assert outcome.weights
    if config[-1]["merge_method"] == "fisher":
        assert "Fisher-weighted mean" in (outcome.out / "README.md").read_text()
        return
    assert "tensors merged" in outcome.output
    assert ", 0 fell back to the linear mean, 0 not converged." in outcome.output
