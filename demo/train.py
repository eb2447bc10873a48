"""Train three tiny Llama experts from one base, on texts that every CPython install has.

Writes ``demo/models/{base,code,manual,names}`` in Hugging Face format, and held-out text beside
them; what is there already and was made with the same settings and versions is kept.
"""

import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from texts import KINDS, TRAIN_CHARS, load
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODELS = Path(__file__).parent / "models"
END = "<|endoftext|>"
SETTINGS: dict[str, Any] = {
    "seed": 0,
    # Beside other busy processes, two threads took three times as long as one (measured).
    "threads": 1,
    "train_chars": TRAIN_CHARS,
    "context": 64,
    "batch": 12,
    "base": {"steps": 400, "learning_rate": 2e-3},
    "expert": {"steps": 80, "learning_rate": 1e-3},
    "llama": {
        "vocab_size": 257,
        "hidden_size": 160,
        "intermediate_size": 432,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    },
}
STAMP = json.dumps(
    SETTINGS
    | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    },
    indent=2,
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a byte and one for the end of a text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: number for number, byte in enumerate(alphabet)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END, eos_token=END, pad_token=END
    )


def train(
    model: LlamaForCausalLM,
    streams: Sequence[torch.Tensor],
    title: str,
    steps: int,
    learning_rate: float,
) -> None:
    """Train ``model`` in place on random windows, as many from each of the streams of tokens."""
    context, windows = SETTINGS["context"], SETTINGS["batch"] // len(streams)
    generator = torch.Generator().manual_seed(SETTINGS["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for _ in (bar := tqdm(range(steps), desc=title)):
        batch = torch.stack(
            [
                stream[start : start + context]
                for stream in streams
                for start in torch.randint(
                    len(stream) - context, (windows,), generator=generator
                ).tolist()
            ]
        )
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def finished(name: str) -> bool:
    """Say whether this model is there, made with the present settings and versions."""
    stamp = MODELS / name / "stamp.json"
    return stamp.is_file() and stamp.read_text() == STAMP


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Write a model folder that appears whole or not at all."""
    folder, partial = MODELS / name, MODELS / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "stamp.json").write_text(STAMP)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def main() -> None:
    """Train what is not there yet."""
    MODELS.mkdir(exist_ok=True)
    for kind in KINDS:
        (MODELS / f"{kind}.txt").write_text(load(kind).held_out, encoding="utf-8")
    missing = [name for name in ("base", *KINDS) if not finished(name)]
    if not missing:
        print(f"{MODELS} is up to date")
        return
    torch.set_num_threads(SETTINGS["threads"])
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SETTINGS["seed"])
    transformers.utils.logging.disable_progress_bar()
    tokenizer = byte_tokenizer()
    streams = {kind: torch.tensor(tokenizer(load(kind).train).input_ids) for kind in KINDS}
    for name in missing:
        if name == "base":
            model = LlamaForCausalLM(
                LlamaConfig(
                    **SETTINGS["llama"],
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
            train(model, list(streams.values()), name, **SETTINGS["base"])
        else:
            model = LlamaForCausalLM.from_pretrained(MODELS / "base", dtype=torch.float32)
            train(model, [streams[name]], name, **SETTINGS["expert"])
        save(model, tokenizer, name)


if __name__ == "__main__":
    main()
