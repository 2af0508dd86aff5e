"""Tiny quantized models, and checkpoints of them that a test may damage."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import change_config
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.errors import SqCpuError
from sq_cpu.quantization.quantize import quantize
from sq_cpu.scheme import Scheme

VOCABULARY = 97


IDS = torch.arange(24).reshape(2, 12) * 31 % VOCABULARY


Q_PROJ = "model.layers.0.self_attn.q_proj"


def tiny_llama(dtype: torch.dtype = torch.float32, *, tied: bool = True) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def tiny_opt(dtype: torch.dtype = torch.float32) -> Any:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=48,
    )
    torch.manual_seed(0)
    return OPTForCausalLM._from_config(config, dtype=dtype).eval()


def quantized(model: Any, scheme: str | Scheme = "O3") -> Any:
    ignore = Scheme.of(scheme).ignore
    calibration = calibrate(model, [IDS], ignore=ignore, progress=False)
    return quantize(model, calibration, scheme=scheme)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def one_token(model: nn.Module) -> torch.Tensor:
    """Return the logits of one row: torch multiplies it in another order than several."""
    with torch.no_grad():
        return model(IDS[:1, :1] + 1).logits  # type: ignore[no-any-return]


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the one safetensors file, its hash brought up to date."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    change_config(folder, lambda c: c["quantization_config"]["files"].update({path.name: digest}))


def fails(match: str, call: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(SqCpuError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
