"""Alignment of a Llama-type model of 1e9 parameters: time, memory, and whether the order is found.

`python benchmarks/align.py` writes align.json and align.md beside this script.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from merges import watch
from rows import Row, row
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from mergekit_karcher.align.families.llama import specification
from mergekit_karcher.align.orders import arranged, random_orders

_MB = 1e6


def config(quick: bool) -> LlamaConfig:
    """8192 neurons a layer, grouped-query attention, as in Llama-3.2-1B but for the vocabulary."""
    scale = 8 if quick else 1
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        hidden_size=2048 // scale,
        intermediate_size=8192 // scale,
        num_hidden_layers=2 if quick else 16,
        num_attention_heads=32 // scale,
        num_key_value_heads=8 // scale,
        head_dim=64,
        vocab_size=32000 // scale,
        tie_word_embeddings=True,
    )


def shapes_of(settings: LlamaConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Tensors by the file that they lie in: one for each layer, one for the rest."""
    width, inner, head = settings.hidden_size, settings.intermediate_size, settings.head_dim
    queries, groups = settings.num_attention_heads * head, settings.num_key_value_heads * head
    count = settings.num_hidden_layers
    files = {
        f"model-{number + 1:05}-of-{count + 1:05}.safetensors": {
            f"model.layers.{number}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (queries, width),
                "self_attn.k_proj": (groups, width),
                "self_attn.v_proj": (groups, width),
                "self_attn.o_proj": (width, queries),
                "mlp.gate_proj": (inner, width),
                "mlp.up_proj": (inner, width),
                "mlp.down_proj": (width, inner),
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
            }.items()
        }
        for number in range(count)
    }
    files[f"model-{count + 1:05}-of-{count + 1:05}.safetensors"] = {
        "model.embed_tokens.weight": (settings.vocab_size, width),
        "model.norm.weight": (width,),
    }
    return files


def write(folder: Path, settings: LlamaConfig, noise: float, plant: bool, seed: int) -> None:
    """The base of seed 0, with noise of that seed relative to it, in a planted order of that seed.

    Every file is made by itself, so that little is in memory.
    """
    folder.mkdir(parents=True)
    settings.save_pretrained(folder)
    index = {}
    for number, (file, shapes) in enumerate(shapes_of(settings).items()):
        base, own = (torch.Generator().manual_seed(1000 * s + number) for s in (0, seed + 1))
        state = {}
        for name, shape in shapes.items():
            tensor = torch.randn(shape, generator=base)
            if noise:
                tensor += noise * torch.randn(shape, generator=own)
            state[name] = (0.02 * tensor).bfloat16()
        if plant and len(shapes) > 2:
            spec = specification(settings.to_dict(), shapes, residual=False)
            orders = random_orders(spec.symmetries, state.__getitem__, seed)
            state = {name: arranged(t, name, orders).contiguous() for name, t in state.items()}
        save_file(state, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def measure(folder: Path, quick: bool) -> Iterator[Row]:
    """Rows for planted orders, with little and much noise, and for fine-tunes."""
    settings = config(quick)
    layer = 2 * sum(math.prod(s) for s in next(iter(shapes_of(settings).values())).values())
    case = {"neurons a layer": settings.intermediate_size, "layers": settings.num_hidden_layers}
    limit = 3 * layer + 8 * settings.intermediate_size**2
    write(folder / "base", settings, 0.0, plant=False, seed=0)
    for seed, name in enumerate(("tiny", "tiny2")):
        write(folder / name, config(quick=True), 0.01, plant=False, seed=seed)
    tiny = [str(folder / name) for name in ("tiny", "tiny2")]
    arguments = ["align", *tiny, "--out", str(folder / "out"), "--dry-run"]
    start_up = watch(arguments, folder / "log", os.environ, "mergekit-karcher")
    contests = {
        "fine-tune (noise 0.01)": (0.01, False),
        "planted": (0.0, True),
        "planted, noise 0.1": (0.1, True),
        "planted, noise 1": (1.0, True),
    }
    for name, (noise, plant) in contests.items():
        write(folder / "other", settings, noise, plant, seed=1)
        started = time.perf_counter()
        for model in ("base", "other"):
            for file in sorted((folder / model).glob("*.safetensors")):
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118
                        tensors.get_tensor(key).float().sum()
        reading = time.perf_counter() - started
        out = folder / "out"
        arguments = ["align", str(folder / "base"), str(folder / "other"), "--out", str(out)]
        found = watch(arguments, folder / "log", os.environ, "mergekit-karcher")
        more = found["peak_anonymous_mb"] - start_up["peak_anonymous_mb"]
        yield row(
            "align",
            case,
            name,
            {
                "seconds": found["seconds"],
                "reading_seconds": reading,
                "start_up_seconds": start_up["seconds"],
                "peak_anonymous_mb": found["peak_anonymous_mb"],
                "over_start_up_mb": more,
                "limit_mb": limit / _MB,
                "exact": _exact(settings, folder, noise, plant, out),
            },
        )
        shutil.rmtree(folder / "other")
        shutil.rmtree(out)


def _exact(settings: LlamaConfig, folder: Path, noise: float, plant: bool, out: Path) -> bool:
    """Whether what was written is the model before it was put into another order."""
    if not plant:
        return not (out / "other").exists()
    write(folder / "truth", settings, noise, plant=False, seed=1)
    same = all(
        (folder / "truth" / file).read_bytes()[-1000:]
        == (out / "other" / file).read_bytes()[-1000:]
        and _equal(folder / "truth" / file, out / "other" / file)
        for file in shapes_of(settings)
    )
    shutil.rmtree(folder / "truth")
    return same


def _equal(left: Path, right: Path) -> bool:
    with safe_open(left, framework="pt") as a, safe_open(right, framework="pt") as b:
        names = list(a.keys())
        return names == list(b.keys()) and all(
            torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in names
        )


def table(rows: Sequence[Row]) -> str:
    """One line for each contest."""
    columns: Mapping[str, str] = {
        "seconds": "align, s",
        "reading_seconds": "reading both, s",
        "start_up_seconds": "start-up, s",
        "over_start_up_mb": "memory over start-up, MB",
        "limit_mb": "3 layers + a cost matrix, MB",
        "exact": "as planted",
    }
    lines = [["", *columns.values()], ["---"] * (len(columns) + 1)]
    for r in rows:
        values = [r["result"][key] for key in columns]
        cells = [
            f"{v:.3g}"
            if isinstance(v, float) and v < 1000
            else f"{v:.0f}"
            if isinstance(v, float)
            else "yes"
            if v
            else "no"
            for v in values
        ]
        lines.append([r["contestant"], *cells])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    about = ", ".join(f"{k} {v}" for k, v in {**rows[0]["machine"], **rows[0]["versions"]}.items())
    case = ", ".join(f"{value} {key}" for key, value in rows[0]["case"].items())
    return (
        "# Alignment of two models\n\n"
        f"Llama-type, bf16, {case}; whole `mergekit-karcher align` processes, outputs written. "
        "Planted: neurons, key/value heads, query heads and values in random orders; noise "
        "relative to the weights. One run each. Reading: all tensors of both once. Start-up: two "
        "models of two small layers.\n\n"
        f"{body}\n\n{about}; {rows[0]['when']} to {rows[-1]['when']}.\n"
    )


def main() -> None:
    """Run all contests and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--scratch", type=Path, help="where the models may lie for a while")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="karcher-benchmark-", dir=options.scratch) as name:
        rows: list[Any] = []
        for found in measure(Path(name), options.quick):
            print(found["contestant"], found["result"], file=sys.stderr, flush=True)
            rows.append(found)
    if not options.quick:
        path = Path(__file__).with_suffix(".json")
        path.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
        path.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
