"""What llm-compressor itself makes of a model, read by sq_cpu, beside compressed-tensors' own run.

python bench/run_llm_compressor.py FOLDER     # in the environment that scripts/llm-compressor makes

Each recipe quantizes the model on the shipped text. sq_cpu reads what it wrote (the integers, or
the floats that they stand for), and transformers runs the same files, with the inputs rounded as
compressed-tensors rounds them. Both are scored beside fp32 on the same windows, and beside each
other.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer
from divergence import Divergence
from results import Out, ResultFile
from shipped import CalibrationWindows, Folder, Shipped, Window, Windows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import sq_cpu
from sq_cpu.checkpoint.sources import load_source
from sq_cpu.progress import track


def recipes() -> dict[str, Callable[[], list[Any]]]:
    """Return what llm-compressor is asked for, by name."""
    try:
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    except ImportError as error:
        raise sq_cpu.SqCpuError(f"{error}: scripts/llm-compressor makes an environment") from None

    def rounded(weights: dict[str, Any], **inputs: Any) -> Any:
        group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True} | weights}
        if inputs:
            static = {"num_bits": 8, "type": "int", "dynamic": False, "strategy": "tensor"}
            group["input_activations"] = static | inputs
        return QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])

    per_channel = {"num_bits": 8, "strategy": "channel"}

    def smoothed() -> Any:
        return SmoothQuantModifier(smoothing_strength=0.8)

    return {
        "SmoothQuant, GPTQ W8A8": lambda: [
            smoothed(),
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ],
        "SmoothQuant, static": lambda: [smoothed(), rounded(per_channel, symmetric=True)],
        "SmoothQuant, static, asymmetric": lambda: [
            smoothed(),
            rounded(per_channel, symmetric=False),
        ],
        "W4A16, groups of 64": lambda: [
            rounded({"num_bits": 4, "strategy": "group", "group_size": 64})
        ],
    }


def compress(
    model: Any, recipe: list[Any], windows: list[Tensor], tokenizer: Any, out: Path
) -> None:
    """Have llm-compressor quantize a copy, and write it."""
    from datasets import Dataset
    from llmcompressor import oneshot

    rows = [{"input_ids": w[0].tolist(), "attention_mask": [1] * w.shape[1]} for w in windows]
    quantized: Any = copy.deepcopy(model)
    oneshot(
        model=quantized,
        recipe=recipe,
        dataset=Dataset.from_list(rows),
        tokenizer=tokenizer,
        max_seq_length=windows[0].shape[1],
        num_calibration_samples=len(windows),
        log_dir=None,
    )
    quantized.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def _lost(row: dict[str, Any]) -> str:
    return f"{row['percent']:+.2f} % +- {row['percent_error']:.2f} (KL {row['kl_mean']:.4f})"


def main(
    folder: Folder,
    windows: Windows = 20,
    window: Window = 512,
    calibration_windows: CalibrationWindows = 16,
    only: Annotated[str, typer.Option(help="Recipes whose names hold this.")] = "",
    out: Out = None,
) -> None:
    """Print perplexity above fp32's, and how far sq_cpu is from the files' own run."""
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    print(machine.headline())
    try:
        shipped = Shipped(windows, window, calibration_windows)
        command = f"python bench/run_llm_compressor.py FOLDER {shipped.options}"
        results = ResultFile("llm-compressor", out, resume=False, sections={"command": command})
        known = {name: make for name, make in recipes().items() if only in name}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        load = AutoModelForCausalLM.from_pretrained
        model: Any = load(folder, dtype=torch.float32).eval()
        seen, scored = shipped.seen(tokenizer), shipped.scored(tokenizer)
        for name, recipe in known.items():
            with tempfile.TemporaryDirectory() as scratch:
                compress(model, recipe(), seen, tokenizer, Path(scratch))
                theirs: Any = load(scratch, dtype=torch.float32).eval()
                ours: Any = load_source(scratch)[0]
            found = {"sq_cpu": Divergence(), "itself": Divergence(), "from itself": Divergence()}
            for ids in track(scored, name):
                reference, own, read = (m(input_ids=ids).logits[0] for m in (model, theirs, ours))
                found["sq_cpu"].add(reference, read, ids[0])
                found["itself"].add(reference, own, ids[0])
                found["from itself"].add(own, read, ids[0])
            rows = {of: divergence.summary() for of, divergence in found.items()}
            for of, row in rows.items():
                results.add({"recipe": name, "variant": of} | row)
            print(
                f"{name:32} itself {_lost(rows['itself'])}, sq_cpu {_lost(rows['sq_cpu'])}; "
                f"sq_cpu above itself {_lost(rows['from itself'])}"
            )
    except sq_cpu.SqCpuError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
