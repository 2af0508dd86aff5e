"""Tiny float models in folders, and what quantizing them in memory gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file
from sameness import assert_same_model
from transformers import AutoConfig, AutoModelForCausalLM

import sq_cpu
from sq_cpu import Scheme
from sq_cpu.models.calls import Batch
from sq_cpu.quantization.recipe import HeadKind
from sq_cpu.smoothing.plan import SmoothPlan
from sq_cpu.smoothing.rules import DEFAULT_ALPHA

_GATED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


# A projection around the blocks, Conv1D, 3-D experts, masks that differ from block to block.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GATED | {"attention_bias": True},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
    },
    "gpt2": {"n_embd": 32, "n_head": 4, "n_inner": 48},
    "mixtral": _GATED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": _GATED
    | {
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def float_folder(folder: Path, model_type: str = "llama", **config: Any) -> Path:
    """Save a tiny random bf16 model of three blocks, in several files."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": tiny.VOCABULARY,
        "num_hidden_layers": 3,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    settings |= CONFIGS.get(model_type, _GATED) | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.2 * noise) if parameter.dim() == 1 else parameter.copy_(0.15 * noise)
    model.bfloat16().save_pretrained(folder, max_shard_size="20KB")
    return folder


def batches() -> list[Batch]:
    """Return four batches, one with padding."""
    ids = tiny.batches()
    mask = torch.ones_like(ids[0])
    mask[1, :5] = 0
    return [*ids, {"input_ids": ids[0], "attention_mask": mask}]


def in_memory(
    source: Path,
    out: Path,
    scheme: Scheme,
    *,
    dtype: torch.dtype = torch.float32,
    alpha: float = DEFAULT_ALPHA,
    rule: str = "smoothquant",
    smooth: bool = True,
    head: HeadKind = "float",
    prefix: tuple[int, ...] = (),
    texts: Sequence[Batch] | None = None,
) -> Any:
    """Quantize and save as a whole."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    texts = batches() if texts is None else texts
    calibration = sq_cpu.calibrate(model, texts, ignore=scheme.ignore, prefix=prefix)
    plan = SmoothPlan.uniform(model, calibration, alpha, rule=rule) if smooth else None
    sq_cpu.quantize(model, calibration, plan, scheme=scheme, smooth=smooth, head=head)
    sq_cpu.save(model, out)
    return model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder; a name in two files is an error."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = load_file(file)
        assert not found.keys() & tensors.keys()
        tensors |= found
    return tensors


def assert_equal(streamed: Path, whole: Path) -> None:
    """Compare two checkpoints: tensors, record, config, logits, also of from_pretrained."""
    found, expected = stored(streamed), stored(whole)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    models = [sq_cpu.load(folder) for folder in (whole, streamed)]
    models.append(AutoModelForCausalLM.from_pretrained(streamed))
    records = [model.sq_cpu_config for model in models]
    assert records[0] == records[1] == records[2]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (whole, streamed)]
    for config in configs:
        del config["quantization_config"]
    assert configs[0] == configs[1]
    for model in models[1:]:
        assert_same_model(model, models[0], tiny.logits)
