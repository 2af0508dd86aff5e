"""Models that vLLM serves: the real one quantized in four ways, and a tiny one with all we have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_model, byte_tokenizer
from torch import nn
from vllm_runs import WAYS

import sq_cpu
from sq_cpu import Scheme, SmoothPlan, texts
from sq_cpu.smoothing.plan import LayerPlan


@pytest.fixture(scope="session")
def real(
    smollm2: Callable[[], tuple[nn.Module, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Give the folder of SmolLM2 quantized in one of `WAYS`, made once."""
    root = tmp_path_factory.mktemp("real")
    made: list[Any] = []

    def folder(way: str) -> Path:
        target = root / way.replace(" ", "-")
        if target.exists():
            return target
        model, tokenizer = smollm2()
        if not made:
            windows = sq_cpu.token_windows(tokenizer, texts.calibration(), window=128, windows=6)
            made.append(sq_cpu.calibrate(model, windows))
        scheme, options = WAYS[way]
        sq_cpu.quantize(model, made[0], scheme=scheme, **options)
        kind = {"format": "compressed-tensors"} if way.startswith("compressed") else {}
        return sq_cpu.save(model, target, tokenizer, **kind)

    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a tiny O3 model: smoothing while it runs, rotations, biases, one linear in float."""

    def folder(**scheme: Any) -> Path:
        model = byte_model(hidden_size=256, intermediate_size=384, head_dim=64)
        generator = torch.Generator().manual_seed(2)
        batches = [torch.randint(3, 259, (2, 48), generator=generator) for _ in range(4)]
        calibration = sq_cpu.calibrate(model, batches)
        plan = SmoothPlan.uniform(model, calibration, 0.5, hadamard=64)
        groups = tuple(replace(group, fold=False, hadamard_fold=0) for group in plan.groups)
        in_float = (LayerPlan(name="model.layers.1.self_attn.o_proj", in_float=True),)
        scheme_of_all = Scheme.of("O3", **scheme)
        plan = replace(plan, groups=groups, layers=in_float, scheme=scheme_of_all)
        quantized: Any = sq_cpu.quantize(model, calibration, plan=plan)
        record = quantized.sq_cpu_config
        assert "model.layers.0.self_attn.q_proj" in record.smoothed
        assert "model.layers.0.mlp.down_proj" in record.hadamard
        assert "model.layers.1.self_attn.o_proj" not in record.layers
        tokenizer = byte_tokenizer()
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        tokenizer.chat_template = template
        return sq_cpu.save(quantized, tmp_path_factory.mktemp("tiny") / "int8", tokenizer)

    return folder


@pytest.fixture(scope="session")
def tiny_folder(tiny: Callable[..., Path]) -> Path:
    """Give such a model as O3 has it, with scales of their own for rows that do not fit."""
    return tiny()
