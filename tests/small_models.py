"""Small models of several classes, texts for them, and their Fisher information by definition."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from mergekit_karcher.metrics.diagonal import Batch

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 63,
}


KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "mixture": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    ),
    "llama classifier": lambda: LlamaForSequenceClassification(
        LlamaConfig(**SMALL, num_labels=3, pad_token_id=0)
    ),
    "bert classifier": lambda: BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)),
}


WORDS = " ".join(f"w{index * 7 % 60}" for index in range(400))


TEXT = ("--data", "text.txt", "--length", 16, "--quiet")


def small_model(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = KINDS[kind]().to(dtype).eval()
    model.set_attn_implementation("eager")
    return model


def small_batch(kind, count=6, length=9):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 63, (count, length), generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator) if "classifier" in kind else None
    return Batch(ids, labels)


def by_a_plain_loop(model, batch, targets=None):
    """The definition: the mean over examples of the squared gradient of each one's loss."""
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for index, ids in enumerate(batch.ids):
        logits = model(input_ids=ids[None]).logits[0]
        if batch.labels is None:
            loss = nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
        else:
            loss = nn.functional.cross_entropy(logits, batch.labels[index])
        model.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name] += parameter.grad**2 / len(batch.ids)
    return squares


def records(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_with_adam(folder, model):
    """A Trainer of Hugging Face that has saved folder/checkpoint-4."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = [{"input_ids": [3 + i, 4, 5, 6], "labels": [3 + i, 4, 5, 6]} for i in range(8)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        adam_beta2=0.95,
        weight_decay=0.1,
        save_steps=4,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(network, arguments, train_dataset=rows)
    trainer.train()
    return trainer
