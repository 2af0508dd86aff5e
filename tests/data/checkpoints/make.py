"""Write the checkpoints that tests/test_old_checkpoints.py loads.

    python tests/data/checkpoints/make.py FOLDER

Later code must load the stored ones as they are: do not make them anew, add others. Those without a
version in their name were written by an earlier state of this script, in format version 3.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[2]))
from sameness import digests

import sq_cpu
from sq_cpu import LayerPlan, Scheme

VOCABULARY = 64
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GATED = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "qwen2": _GATED | {"tie_word_embeddings": True},
    "mixtral": _GATED | {"num_local_experts": 4, "num_experts_per_tok": 3},
    "gpt2": _COMMON | {"n_embd": 32, "n_inner": 48, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "opt": _COMMON
    | {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
}


def save_float(folder: Path, model_type: str, **options: Any) -> Path:
    """Save a tiny random float model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **CONFIGS[model_type])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.2 * noise) if parameter.dim() == 1 else parameter.copy_(0.15 * noise)
    model.save_pretrained(folder, **options)
    return folder


def load_float(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def batches() -> list[torch.Tensor]:
    """Return token ids, int64 [2, 16] each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (2, 16), generator=generator) for _ in range(4)]


def expect(folder: Path) -> None:
    """Store beside a checkpoint what it gives."""
    model: Any = sq_cpu.load(folder)
    ids = batches()[0]
    with torch.no_grad():
        logits = model(ids).logits
    save_file({"ids": ids, "logits": logits}, folder.parent / f"{folder.name}.safetensors")
    text = json.dumps(digests(model), indent=0)
    (folder.parent / f"{folder.name}.json").write_text(text + "\n")


def mixed(out: Path, name: str) -> None:
    """Save a checkpoint with a searched plan, from which linears depart in all ways (4, 5)."""
    float_folder = save_float(out / "float", "llama")
    model = load_float(float_folder)
    calibration = sq_cpu.calibrate(model, batches(), rows=8)
    plan = sq_cpu.tune(model, calibration, scheme="O3")
    block = "model.layers.{}.".format
    layers = (
        LayerPlan(name=block(0) + "self_attn.q_proj", activations="per_token"),
        LayerPlan(name=block(0) + "self_attn.o_proj", in_float=True, note="sensitive"),
        LayerPlan(name=block(0) + "mlp.down_proj", outliers=(0, 5, 11)),
        LayerPlan(name=block(1) + "self_attn.k_proj", activations="per_tensor", weight_clip=0.75),
        LayerPlan(name=block(1) + "mlp.down_proj", activations="per_token", outliers=(2,)),
    )
    groups = (replace(plan.groups[0], fold=False, note="at run time"), *plan.groups[1:])
    plan = replace(plan, groups=groups, layers=layers, scheme=Scheme.of("O3"))
    sq_cpu.save(sq_cpu.quantize(model, calibration, plan), out / name)
    remove(float_folder)


def head(out: Path, name: str) -> None:
    """Save a checkpoint whose embedding reads the int8 head's weight."""
    float_folder = save_float(out / "float", "qwen2")
    model = load_float(float_folder)
    calibration = sq_cpu.calibrate(model, batches(), rows=8)
    sq_cpu.save(sq_cpu.quantize(model, calibration, scheme="O3", head="int8"), out / name)
    remove(float_folder)


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def main(out: Path) -> None:
    """Write everything into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    head(out, "version-6-head")
    expect(out / "version-6-head")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
