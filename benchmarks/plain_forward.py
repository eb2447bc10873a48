"""The rival of `mergekit-karcher fisher --kind activations`: the forward passes alone.

python benchmarks/plain_forward.py MODEL TEXT LENGTH COUNT OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

# transformers would take benchmarks/kernels.py for the package of that name.
sys.path.pop(0)

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def main(folder: str, text: str, length: int, count: int, out: str) -> None:
    """Write the mean of the last hidden states of the first windows of a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(Path(text).read_text()).input_ids)
    windows = ids.unfold(0, length, length)[:count]
    states = [model.model(input_ids=window[None]).last_hidden_state.mean(1) for window in windows]
    save_file({"mean": torch.cat(states).mean(0)}, out)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:5]), sys.argv[5])
