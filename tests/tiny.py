"""Tiny random models, one per supported model type, and calibration data for them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from sq_cpu.calibration.calibrate import Calibration
from sq_cpu.checkpoint.config import SETTINGS_DIGEST, settings_digest
from sq_cpu.models.linears import linearized, quantizable_linears
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import LayerPlan, SmoothPlan

VOCABULARY = 64

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_GATED = _SIZES | {"num_key_value_heads": 2}
_GPT = {"n_embd": 32, "n_inner": 48, "n_head": 4, "n_layer": 2, "n_positions": 64}
_FALCON = {"hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "bias": True}
# Three of four: a batch of random tokens reaches every expert.
_EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 16}
_MLA = _SIZES | _EXPERTS
_MLA |= {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
_MLA |= {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_MLA |= {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
_T5 = {"d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0}
_IMAGES = _SIZES | {"num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
_TEXTS = _SIZES | {"num_hidden_layers": 2, "vocab_size": VOCABULARY}
_TEXTS |= {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}

# By model type, and after a "-" a variant of it. Grouped-query attention, head sizes other than
# hidden / heads, and every bias that may exist.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GATED | {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    "mistral": _GATED | {"head_dim": 8, "num_key_value_heads": 1},
    "qwen2": _GATED,
    "qwen3": _GATED | {"head_dim": 12},
    "smollm3": _GATED,
    "granite": _GATED | {"residual_multiplier": 0.5, "attention_multiplier": 0.25},
    "mixtral": _GATED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 3},
    "olmoe": _GATED | {"num_experts": 4, "num_experts_per_tok": 3},
    "qwen2_moe": _GATED
    | _EXPERTS
    | {"num_experts": 4, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "qwen3_moe": _GATED | _EXPERTS | {"num_experts": 4, "head_dim": 12, "mlp_only_layers": [0]},
    "deepseek_v2": _MLA | {"q_lora_rank": 16, "attention_bias": True},
    "deepseek_v2-lite": _MLA | {"q_lora_rank": None},
    "deepseek_v3": _MLA | {"q_lora_rank": 16},
    "phi": _GATED,
    "phi-relu": _GATED | {"hidden_act": "relu", "qk_layernorm": True},
    "phi3": _GATED,
    "glm": _GATED | {"head_dim": 8, "attention_bias": True},
    "glm4": _GATED | {"head_dim": 12, "attention_bias": True},
    "gemma": _GATED | {"head_dim": 8},
    "gemma2": _GATED | {"head_dim": 12, "query_pre_attn_scalar": 12},
    "gemma3_text": _GATED | {"head_dim": 12, "query_pre_attn_scalar": 12},
    "gemma3": {
        "text_config": _GATED | _TEXTS | {"head_dim": 12, "query_pre_attn_scalar": 12},
        "vision_config": _IMAGES | {"vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": VOCABULARY - 1,
    },
    "olmo2": _GATED,
    "stablelm": _GATED | {"use_qkv_bias": True},
    "stablelm-parallel": _GATED | {"use_parallel_residual": True, "qk_layernorm": True},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "opt-350m": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 24,
        "do_layer_norm_before": False,
    },
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    "bloom-postnorm": {
        "hidden_size": 32,
        "n_head": 4,
        "n_layer": 2,
        "apply_residual_connection_post_layernorm": True,
    },
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_neox": _SIZES,
    "gpt_neox-sequential": _SIZES | {"use_parallel_residual": False},
    "falcon": _FALCON | {"multi_query": True},
    "falcon-rw": _FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True},
    "falcon-new": _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-new_one_norm": _FALCON
    | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "mpt-clipped": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"clip_qkv": 100.0},
    },
    "bert": _SIZES,
    "roberta": _SIZES | {"hidden_act": "relu"},
    "t5": _T5,
    "t5-gated": _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "whisper": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_mel_bins": 8,
        "max_source_positions": 12,
        "decoder_start_token_id": 1,
    },
    "vit": _IMAGES,
    "clip": {"text_config": _TEXTS, "vision_config": _IMAGES, "projection_dim": 16},
}

# Classes of those that are no causal language models.
_CLASSES = {
    "bert": "BertForMaskedLM",
    "clip": "CLIPModel",
    "gemma3": "Gemma3ForConditionalGeneration",
    "roberta": "RobertaForMaskedLM",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "whisper": "WhisperForConditionalGeneration",
}


def tiny_model(name: str, *, seed: int = 0, dtype: Any = torch.float32, **config: Any) -> Any:
    """Return a random model whose norms and biases are random too, unlike a fresh one's."""
    torch.manual_seed(seed)
    model_type = name.partition("-")[0]
    settings: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if not {"text_config", "image_size"} & CONFIGS[name].keys():
        settings |= {"vocab_size": VOCABULARY}
        if not {"n_layer", "n_layers", "num_layers", "encoder_layers"} & CONFIGS[name].keys():
            settings |= {"num_hidden_layers": 2, "max_position_embeddings": 64}
    settings |= CONFIGS[name] | config
    auto = AutoModelForCausalLM.from_config
    make = auto if model_type not in _CLASSES else getattr(transformers, _CLASSES[model_type])
    model = make(AutoConfig.for_model(model_type, **settings))
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


def inputs(name: str, count: int = 3) -> list[dict[str, Tensor]]:
    """Return the keyword arguments of a tiny model's forward, for each of some batches."""
    generator = torch.Generator().manual_seed(3)
    model_type = name.partition("-")[0]

    def one(ids: Tensor) -> dict[str, Tensor]:
        images = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
        if model_type == "t5":
            return {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :9]}
        if model_type == "whisper":
            features = torch.randn(2, 8, 24, generator=generator)
            return {"input_features": features, "decoder_input_ids": ids}
        if model_type == "vit":
            return images
        if model_type == "clip":
            return images | {"input_ids": ids}
        if model_type == "gemma3":
            image_token = VOCABULARY - 1
            ids = ids % image_token
            ids[:, 2:6] = image_token
            return images | {"input_ids": ids, "token_type_ids": (ids == image_token).long()}
        return {"input_ids": ids}

    return [one(ids) for ids in batches(count)]


def mixed_plan(model: Any, calibration: Calibration, scheme: Scheme) -> SmoothPlan:
    """Return a plan in which neighbouring linears differ in all that a plan can say of them."""
    uniform = SmoothPlan.uniform(model, calibration, 0.7, ignore=scheme.ignore, hadamard=0)
    clips = itertools.cycle((0.5, 1.0, 1.25))
    curve = ((0.0, 2.0), (0.7, 1 / 3))
    groups = [replace(group, clip=next(clips), curve=curve) for group in uniform.groups]
    with linearized(model):
        names = list(quantizable_linears(model, scheme.ignore))
    kinds: list[dict[str, Any]] = [
        {"in_float": True, "note": "for the test"},
        {"activations": "static"},
        {"activations": "per_tensor", "weight_clip": 0.6},
        {},
        {"activations": "per_token"},
        {"weight_clip": 0.8, "outliers": (2,)},
        {"in_float": True},
        {"activations": "static", "outliers": (0, 5, 11)},
    ]
    layers = [
        LayerPlan(name=name, **kind)
        for name, kind in zip(names, itertools.cycle(kinds), strict=False)
        if kind
    ]
    return SmoothPlan(tuple(groups), tuple(layers), scheme)


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
        settings[SETTINGS_DIGEST] = settings_digest(settings)
    path.write_text(json.dumps(content))
