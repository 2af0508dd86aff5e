"""Write the checkpoints that tests/test_old_checkpoints.py loads.

    python tests/data/checkpoints/make.py FOLDER

The stored ones were written by the commit before the package was divided into packages. Later code
must load them as they are: do not make them anew, add others.
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
from sq_cpu import LayerPlan, Scheme, SmoothPlan

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


def tuned(out: Path) -> None:
    """Tune a plan with a calibration, both of which are saved, and let linears depart from it."""
    model = load_float(save_float(out / "tuned-float", "llama"))
    calibration = sq_cpu.calibrate(model, batches(), rows=8, gradient_rows=8)
    calibration.save(out / "tuned.calibration")
    plan = replace(sq_cpu.tune(model, calibration, scheme="O3"), scheme=Scheme.of("O3"))
    plan.save(out / "tuned.plan.json")
    block = "model.layers.{}.".format
    layers = (
        LayerPlan(name=block(0) + "self_attn.q_proj", activations="per_token"),
        LayerPlan(name=block(0) + "self_attn.o_proj", in_float=True, note="sensitive"),
        LayerPlan(name=block(0) + "mlp.down_proj", outliers=(0, 5, 11)),
        LayerPlan(name=block(1) + "self_attn.k_proj", activations="per_tensor", weight_clip=0.75),
        LayerPlan(name=block(1) + "mlp.down_proj", activations="per_token", outliers=(2,)),
    )
    plan = replace(plan, layers=layers)
    plan.save(out / "tuned-mixed.plan.json")
    sq_cpu.save(sq_cpu.quantize(model, calibration, plan), out / "tuned")


def quantized(out: Path, name: str, model_type: str, scheme: Scheme, **plan: Any) -> None:
    """Save a checkpoint; `plan` changes its groups."""
    float_folder = save_float(out / "float", model_type)
    model = load_float(float_folder)
    calibration = sq_cpu.calibrate(model, batches())
    uniform = SmoothPlan.uniform(model, calibration, 0.5, ignore=scheme.ignore)
    groups = tuple(replace(group, **plan) for group in uniform.groups)
    sq_cpu.save(sq_cpu.quantize(model, calibration, SmoothPlan(groups), scheme=scheme), out / name)
    remove(float_folder)


def streamed(out: Path) -> None:
    float_folder = save_float(out / "float", "qwen2", max_shard_size="20KB")
    sq_cpu.quantize_checkpoint(
        float_folder, out / "streamed", batches(), scheme="O3", dtype=torch.bfloat16
    )
    remove(float_folder)


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def main(out: Path) -> None:
    """Write everything into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    quantized(out, "o1", "mixtral", Scheme.of("O1"))
    tuned(out)
    quantized(out, "weight-groups", "gpt2", Scheme(weights="per_group", weight_group_rows=5))
    asymmetric = Scheme.of("O2", symmetric=False, reduce_range=True)
    quantized(out, "o2-asymmetric", "opt", asymmetric)
    streamed(out)
    quantized(out, "smoothing", "llama", Scheme.of("O3"), fold=False, note="at run time")
    for name in ("o1", "tuned", "weight-groups", "o2-asymmetric", "streamed", "smoothing"):
        expect(out / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
