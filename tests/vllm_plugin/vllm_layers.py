"""What runs beside vLLM's model, in the processes that have it."""

from __future__ import annotations

from typing import Any

import torch

import sq_cpu

ROWS = 5


def held_against_ours(folder: str, model: Any) -> dict[str, Any]:
    """Hold each linear of ours in vLLM against `QuantLinear`, and say whether the bits are equal.

    Of a layer whose input is split over ranks, give what this rank adds to the sum, and ours of it
    all: [2, ROWS, N]. Rows are random, one of them zeros; where the input is whole, one is beyond
    any static scale and one far below. What was loaded must be free by then.
    """
    ours = dict(sq_cpu.load(folder).named_modules())
    merged = model.packed_modules_mapping
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name, module in model.named_modules():
            if not hasattr(module, "sq_cpu_packed"):
                continue
            assert module.weight is None
            assert module.weight_scale is None
            parent, _, last = name.rpartition(".")
            rank, ranks = module.tp_rank, module.tp_size
            is_split = ranks > 1 and hasattr(module, "input_is_parallel")
            x = torch.randn(ROWS, module.input_size, generator=generator)
            x[1] = 0
            if not is_split:
                x[2], x[3] = x[2] * 100, x[3] / 1000
            parts = [ours[f"{parent}.{each}"](x) for each in merged.get(last, [last])]
            if is_split:
                bias = module.bias if rank == 0 else None
                y = module.quant_method.apply(module, x.chunk(ranks, -1)[rank].contiguous(), bias)
                found[name] = [y.tolist(), parts[0].tolist()]
            else:
                y = module.quant_method.apply(module, x, module.bias)
                here = [part.chunk(ranks, -1)[rank] for part in parts]
                found[name] = torch.equal(y, torch.cat(here, dim=-1))
    return found
