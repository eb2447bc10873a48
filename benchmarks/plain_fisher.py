"""The rival of `mergekit-karcher fisher`: a loop of backward passes, as one would write it.

python benchmarks/plain_fisher.py MODEL TEXT LENGTH COUNT OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

# transformers would take benchmarks/kernels.py for the package of that name.
sys.path.pop(0)

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, text: str, length: int, count: int, out: str) -> None:
    """Write the mean of the squared gradients of the first windows of a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(Path(text).read_text()).input_ids)
    squares = {name: torch.zeros_like(p).double() for name, p in model.named_parameters()}
    for window in ids.unfold(0, length, length)[:count]:
        logits = model(input_ids=window[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()
        for name, parameter in model.named_parameters():
            squares[name] += parameter.grad.square()
        model.zero_grad()
    save_file({name: (own / count).float() for name, own in squares.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:5]), sys.argv[5])
