"""What a prefix in float buys a real model: nats a token above fp32 on the same ids.

python bench/run_prefix.py MODEL [--windows 20] [--scheme O3] [--hadamard 64] [--alpha 0.8]

Every row is scored on windows that begin with what the tokenizer puts in front of a text; `--lead`
has it put its BOS there. "quantized" calibrates with that token and quantizes it like any other,
"prefix" keeps its keys and values in float. The standard error is of the difference to fp32, over
windows.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

import sq_cpu
from sq_cpu import texts
from sq_cpu.quantization.quantize import carry_out
from sq_cpu.quantization.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--calibration-windows", type=int, default=8)
    parser.add_argument("--scheme", default="O3")
    parser.add_argument("--hadamard", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=0.8)
    parser.add_argument("--lead", action="store_true")
    parser.add_argument("--fuse", action="store_true", help="score what `fuse` makes of it")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.lead:
        sq_cpu.lead_with(tokenizer)
    size = {"window": options.window}
    scored = sq_cpu.token_windows(tokenizer, texts.evaluation(), windows=options.windows, **size)
    batches = sq_cpu.token_windows(
        tokenizer, texts.calibration(), windows=options.calibration_windows, **size
    )
    prefix = sq_cpu.leading_ids(tokenizer)
    print(
        f"{options.model}: prefix {prefix}, {tokenizer.convert_ids_to_tokens(prefix)}", flush=True
    )

    model = load(options.model)
    logs, references = [], []
    for ids in scored:
        found = log_probabilities(model, ids)
        references.append(losses(found, ids))
        logs.append(found.half())  # of a large vocabulary they are some 100 MB a window
    reference = torch.stack(references)
    print(f"fp32: perplexity {math.exp(reference.mean()):.3f}", flush=True)
    recipe = Recipe.of(options.scheme, None, alpha=options.alpha, hadamard=options.hadamard)
    for name, ids in (("quantized", ()), ("prefix", prefix)):
        model = load(options.model)
        calibration = sq_cpu.calibrate(model, batches, prefix=ids, progress=False)
        carry_out(model, calibration, recipe, progress=False)
        if options.fuse:
            sq_cpu.fuse(model)
        nats, divergences = [], []
        for window, float_logs in zip(scored, logs, strict=True):
            found = log_probabilities(model, window)
            nats.append(losses(found, window))
            float_logs = float_logs.float()
            divergence = kl_div(found, float_logs, log_target=True, reduction="none").sum(-1)
            divergences.append(divergence[0, :-1].mean())
        each = (torch.stack(nats) - reference).mean(dim=1)
        kl = torch.stack(divergences)
        print(
            f"{options.scheme}, hadamard {options.hadamard}, alpha {options.alpha}, {name}: "
            f"nats above fp32 {shown(each)}, KL {shown(kl)}; "
            f"perplexity {math.exp(torch.stack(nats).mean()):.3f} "
            f"({math.expm1(float(each.mean())):+.2%})",
            flush=True,
        )


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    logs: Tensor = model(ids).logits.float().log_softmax(-1)
    return logs


def losses(logs: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logs[0, :-1].float(), ids[0, 1:], reduction="none").double()


def shown(values: Tensor) -> str:
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{float(values.mean()):.4f} +- {error:.4f}"


if __name__ == "__main__":
    main()
