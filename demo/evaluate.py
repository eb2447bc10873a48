"""Print bits per byte on held-out text for the base, the experts and the two merges of them."""

import math
import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from texts import KINDS, load
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

DEMO = Path(__file__).parent
FOLDERS = {name: DEMO / "models" / name for name in ("base", *KINDS)} | {
    "linear": DEMO / "out-linear",
    "karcher": DEMO.parent / "out",
}
CONTEXT = 64


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Return the mean code length of a byte (= a token), given those before it in its window."""
    return model(input_ids=windows, labels=windows).loss.item() / math.log(2)


def main() -> None:
    """Evaluate every model on every text, then let the Karcher mean write one line."""
    missing = [str(folder) for folder in FOLDERS.values() if not (folder / "config.json").is_file()]
    if missing:
        sys.exit(f"no model in {', '.join(missing)}: run demo/train.py and both merges first")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    texts = {kind: load(kind).held_out for kind in KINDS}
    table = Table("model", title="Bits per byte on held-out text", caption="less is better")
    for column in (*KINDS, "mean"):
        table.add_column(column, justify="right")
    for name, folder in FOLDERS.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        bits = []
        for text in texts.values():
            tokens = tokenizer(text, return_tensors="pt").input_ids[0]
            bits.append(bits_per_byte(model, tokens.unfold(0, CONTEXT, CONTEXT)))
        table.add_row(name, *(f"{value:.3f}" for value in [*bits, sum(bits) / len(bits)]))
    console = Console()
    console.print(table)
    # The Karcher mean is the last of the folders, so model and tokenizer are still its own.
    prompt = tokenizer("LATIN ", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    line = tokenizer.decode(written[0]).splitlines()[0]
    console.print(f"karcher writes: {line}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
