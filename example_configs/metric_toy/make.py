"""The example of two optima in two metrics: writes the four files that config.yml names."""

from pathlib import Path

import torch
from safetensors.torch import save_file

OPTIMA = {"first": [0.0, 0.0], "second": [1.0, 1.0]}
METRICS = {"first": [100.0, 1.0], "second": [1.0, 100.0]}

if __name__ == "__main__":
    folder = Path(__file__).parent
    for name in OPTIMA:
        save_file({"theta": torch.tensor(OPTIMA[name])}, folder / f"{name}.safetensors")
        save_file({"theta": torch.tensor(METRICS[name])}, folder / f"{name}_metric.safetensors")
