"""The memory that streaming quantization takes, on a random LLaMA checkpoint of a 7B model's shape.

The checkpoint is written file by file from random tensors, quantized in a process of its own, and
removed. The bound: three times the largest block as bf16, and the calibration's activations.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer
from safetensors.torch import save_file
from transformers import LlamaConfig

from sq_cpu.files import write_file

HIDDEN, FFN, VOCABULARY, HEADS = 4096, 11008, 32000, 32

# What the measured process runs: arguments in, one JSON object out.
_CHILD = """
import json, sys, time
from pathlib import Path
import torch, transformers
from transformers.models.llama import modeling_llama  # lazily imported: part of the baseline
import sq_cpu

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {key: int(line.split()[1]) << 10 for line in lines
            if (key := line.partition(":")[0]) in ("VmHWM", "VmRSS")}

source, out, scheme, dtype, windows, window, vocabulary = sys.argv[1:]
generator = torch.Generator().manual_seed(0)
shape = (1, int(window))
batches = [torch.randint(int(vocabulary), shape, generator=generator) for _ in range(int(windows))]
torch.ones(64, 64) @ torch.ones(64, 64)  # starts the threads
baseline = peak()
start = time.perf_counter()
made = sq_cpu.quantize_checkpoint(source, out, batches, scheme=scheme,
                                  dtype=getattr(torch, dtype), progress=False)
print(json.dumps({
    "baseline_rss": baseline["VmRSS"], "baseline_peak": baseline["VmHWM"],
    "peak": peak()["VmHWM"], "seconds": round(time.perf_counter() - start, 1),
    "layers": len(made.record.layers), "calibration_tokens": made.calibration_tokens,
}))
"""


def write_checkpoint(folder: Path, config: LlamaConfig) -> int:
    """Write random bf16 weights, a file a block; return the bytes of one block."""
    generator = torch.Generator().manual_seed(0)
    hidden, ffn = config.hidden_size, config.intermediate_size

    def random(*shape: int) -> torch.Tensor:
        scale = shape[-1] ** -0.5
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(scale)

    def norm() -> torch.Tensor:
        return random(hidden).add_(1)

    shapes = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
        **{f"mlp.{name}_proj": (ffn, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, ffn),
    }
    file_of: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> int:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(tensors, name))
        return sum(tensor.nbytes for tensor in tensors.values())

    config.save_pretrained(folder)
    head = (config.vocab_size, hidden)
    write(
        "model-outside.safetensors",
        {
            "model.embed_tokens.weight": random(*head),
            "model.norm.weight": norm(),
            "lm_head.weight": random(*head),
        },
    )
    block = 0
    for index in range(config.num_hidden_layers):
        tensors = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
        tensors |= {
            f"{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm")
        }
        named = {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}
        block = write(f"model-block-{index:02d}.safetensors", named)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return block


def main(
    layers: Annotated[int, typer.Option(min=1)] = 32,
    scheme: str = "O3",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    windows: Annotated[int, typer.Option(min=1)] = 4,
    window: Annotated[int, typer.Option(min=2)] = 256,
    folder: Annotated[Path | None, typer.Option(help="Where the files go meanwhile.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="JSON file to write.")] = None,
) -> None:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    work = Path(tempfile.mkdtemp(prefix="streaming-", dir=folder))
    try:
        source = work / "float"
        source.mkdir()
        start = time.perf_counter()
        block = write_checkpoint(source, config)
        written = time.perf_counter() - start
        sizes = [str(windows), str(window), str(VOCABULARY)]
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, source, work / "int8", scheme, dtype, *sizes],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        measured: dict[str, Any] = json.loads(child.stdout)
        stored = sum(path.stat().st_size for path in source.iterdir())
        made = sum(path.stat().st_size for path in (work / "int8").iterdir())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    # Carried hidden states, and the largest tensor of one batch: gate, up and their product.
    itemsize = getattr(torch, dtype).itemsize
    carried = windows * window * HIDDEN * itemsize
    activations = carried + 3 * window * FFN * itemsize
    bound = 3 * block + activations
    above = measured["peak"] - measured["baseline_rss"]
    result = {
        "command": " ".join(["python", "bench/run_streaming.py", *sys.argv[1:]]),
        "machine": machine.facts(),
        "model": {"layers": layers, "hidden": HIDDEN, "ffn": FFN, "vocabulary": VOCABULARY},
        "scheme": scheme,
        "dtype": dtype,
        "calibration": {"windows": windows, "window": window},
        "bytes": {
            "checkpoint": stored,
            "quantized": made,
            "block_bf16": block,
            "activations": activations,
            "bound": bound,
            "baseline": measured["baseline_rss"],
            "peak": measured["peak"],
            "peak_above_baseline": above,
        },
        "peak_over_bound": round(above / bound, 3),
        "peak_in_blocks": round((above - activations) / block, 2),
        "seconds": {"writing_the_checkpoint": round(written, 1), "quantizing": measured["seconds"]},
        "linears": measured["layers"],
    }
    typer.echo(json.dumps(result, indent=2))
    if out is not None:
        write_file(out, json.dumps(result, indent=2) + "\n")
    if above > bound:
        raise SystemExit("the peak is above the bound")


if __name__ == "__main__":
    typer.run(main)
