"""A language model by Intel Extension for PyTorch's SmoothQuant, and by sq_cpu from its recipe.

python bench/run_ipex.py FOLDER            # in the environment that scripts/ipex makes

IPEX 2.8, the last, calibrates on the shipped text, writes its recipe, and runs what it makes of it
(traced and frozen). sq_cpu carries the same recipe out (`plan_from_qconf`), and its own O3. All are
scored beside fp32 on the same windows, and timed on one of them, in turns, without a cache of keys.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer
from divergence import Divergence
from harness import Candidate, interleave
from results import Out, ResultFile
from shipped import CalibrationWindows, Folder, Shipped, Window, Windows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import sq_cpu
from sq_cpu.progress import track

Logits = Callable[[Tensor], Tensor]


def of_ipex(model: Any, windows: list[Tensor], alpha: float, recipe: Path) -> dict[str, Logits]:
    """Return what IPEX makes of a model, in bf16 and in int8; write its recipe."""
    try:
        ipex: Any = importlib.import_module("intel_extension_for_pytorch")
    except ImportError as error:
        raise sq_cpu.SqCpuError(f"{error}: scripts/ipex makes an environment with it") from None
    quantization = ipex.quantization
    mapping = quantization.get_smooth_quant_qconfig_mapping(alpha=alpha)
    example = {"input_ids": windows[0]}
    prepared = quantization.prepare(
        copy.deepcopy(model), mapping, example_kwarg_inputs=example, inplace=True
    )
    for ids in track(windows, "calibrating IPEX"):
        prepared(input_ids=ids)
    prepared.save_qconf_summary(qconf_summary=str(recipe))
    bf16 = ipex.optimize(copy.deepcopy(model).bfloat16(), dtype=torch.bfloat16, inplace=True)
    return {
        "IPEX int8": _traced(quantization.convert(prepared), example),
        "IPEX bf16": _traced(bf16, example),
    }


def _traced(model: Any, example: dict[str, Tensor]) -> Logits:
    traced: Any = torch.jit.trace(
        model, example_kwarg_inputs=example, strict=False, check_trace=False
    )
    frozen: Any = torch.jit.freeze(traced.eval())
    for _ in range(2):  # which optimizes it
        frozen(**example)
    return lambda ids: frozen(input_ids=ids)["logits"][0]  # type: ignore[no-any-return]


def of_ours(model: Any, windows: list[Tensor], recipe: Path) -> dict[str, Logits]:
    """Return what sq_cpu makes of a model: of the recipe, and by its own defaults."""

    def made(ignore: tuple[str, ...], **how: Any) -> Logits:
        quantized: Any = copy.deepcopy(model)
        sq_cpu.quantize(quantized, sq_cpu.calibrate(quantized, windows, ignore=ignore), **how)
        sq_cpu.fuse(quantized)
        return lambda ids: quantized(input_ids=ids).logits[0]  # type: ignore[no-any-return]

    plan = sq_cpu.plan_from_qconf(recipe, model)
    return {
        "sq_cpu, IPEX's recipe": made((), plan=plan),
        "sq_cpu O3": made(("lm_head",), scheme="O3", head="int8"),  # as IPEX quantizes the head
    }


def main(
    folder: Folder,
    alpha: Annotated[float, typer.Option(help="Of IPEX's SmoothQuant.")] = 0.8,
    windows: Windows = 20,
    window: Window = 512,
    calibration_windows: CalibrationWindows = 16,
    budget: Annotated[float, typer.Option(min=1, help="Seconds to time in.")] = 60,
    out: Out = None,
) -> None:
    """Print perplexity above fp32's, KL to it, and the time of a window over sq_cpu O3's."""
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    print(machine.headline())
    try:
        shipped = Shipped(windows, window, calibration_windows)
        command = f"python bench/run_ipex.py FOLDER --alpha {alpha:g} {shipped.options}"
        sections = {"command": command, "threads": torch.get_num_threads()}
        results = ResultFile("ipex", out, resume=False, sections=sections)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # IPEX traces: without a cache, which a trace cannot hold, and masks made in Python.
        load = AutoModelForCausalLM.from_pretrained
        model: Any = load(folder, dtype=torch.float32, attn_implementation="eager").eval()
        model.config.use_cache = False
        seen = shipped.seen(tokenizer)
        with tempfile.TemporaryDirectory() as scratch:
            recipe = Path(scratch) / "best_configure.json"
            peers = of_ipex(model, seen, alpha, recipe)
            made = of_ours(model, seen, recipe) | peers
        made = {"sq_cpu O3": made["sq_cpu O3"]} | made | {"fp32": lambda ids: model(ids).logits[0]}
        scored = shipped.scored(tokenizer)
        divergences = {name: Divergence() for name in made}
        for ids in track(scored, "windows"):
            reference = made["fp32"](ids)
            for name, logits in made.items():
                divergences[name].add(reference, logits(ids), ids[0])
        calls = {
            name: Candidate(lambda _, logits=logits: logits(scored[0]))
            for name, logits in made.items()
        }
        stats = interleave(calls, warm=False, budget=budget)
        for name, divergence in divergences.items():
            ratio = stats[name].median / stats["sq_cpu O3"].median
            row = {"variant": name} | divergence.summary()
            results.add(row | {"milliseconds": 1e3 * stats[name].median, "ratio": ratio})
            print(
                f"{name:22} {row['perplexity']:.3f}: {row['percent']:+.2f} % "
                f"+- {row['percent_error']:.2f}, KL {row['kl_mean']:.4f}; "
                f"{1e3 * stats[name].median:.0f} ms, {ratio:.2f} of sq_cpu O3's"
            )
    except sq_cpu.SqCpuError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
