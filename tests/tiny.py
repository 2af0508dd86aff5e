"""Tiny random models, one per supported model type, and calibration data for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from sq_cpu.checkpoint import config_digest

VOCABULARY = 64

_GATED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# Grouped-query attention, head sizes other than hidden / heads, and every bias that may exist.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GATED | {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    "mistral": _GATED | {"head_dim": 8, "num_key_value_heads": 1},
    "qwen2": _GATED,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "gemma": _GATED | {"head_dim": 8},
}


def tiny_model(model_type: str, *, seed: int = 0, dtype: Any = torch.float32, **config: Any) -> Any:
    """Return a random model whose norms and biases are random too, unlike a fresh one's."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    settings |= CONFIGS[model_type] | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            # Weights large enough that attention and activations are far from linear.
            parameter.add_(0.2 * noise) if parameter.dim() == 1 else parameter.copy_(0.15 * noise)
    return model.to(dtype).eval()


def batches(count: int = 3, length: int = 16) -> list[Tensor]:
    """Return random token ids, int64 [2, length] each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (2, length), generator=generator) for _ in range(count)]


def logits(model: Any) -> Tensor:
    """Return the model's logits on fixed ids, fp32."""
    with torch.no_grad():
        result: Tensor = model(batches(1)[0]).logits.float()
    return result


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit a checkpoint's config.json, its digest brought up to date."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    if isinstance(settings := content.get("quantization_config"), dict):
        settings["config_sha256"] = config_digest(content)
    path.write_text(json.dumps(content))
