"""Tiny random models of transformers that no family's row is for, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny import VOCABULARY
from torch import Tensor
from transformers import AutoConfig

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA = {"state_size": 4, "conv_kernel": 4, "expand": 2, "time_step_rank": 4}
_IMAGES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 8}
_IMAGES |= {"num_attention_heads": 4, "patch_size": 4}

# By model type: the class, and what its config says.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaForCausalLM", _SIZES | _MAMBA),
    "jamba": (
        "JambaForCausalLM",
        _SIZES
        | {"mamba_dt_rank": 4, "use_mamba_kernels": False, "num_experts": 2}
        | {"attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "rwkv": ("RwkvForCausalLM", _SIZES | {"rescale_every": 1, "attention_hidden_size": 32}),
    "deberta": ("DebertaModel", _SIZES | {"pos_att_type": ["c2p", "p2c"]}),
    "deepseek_v32": (
        "DeepseekV32ForCausalLM",
        _SIZES
        | {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "n_routed_experts": 4}
        | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12, "index_head_dim": 16}
        | {"index_n_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": _SIZES | {"model_type": "llama"},
            "vision_config": _IMAGES | {"model_type": "clip_vision_model"},
            "image_token_index": VOCABULARY - 1,
        },
    ),
    "blip-2": (
        "Blip2ForImageTextRetrieval",
        {
            "vision_config": _IMAGES,
            "qformer_config": _SIZES | {"encoder_hidden_size": 32, "use_qformer_text_input": True},
            "text_config": _SIZES | {"model_type": "opt", "ffn_dim": 48},
            "image_text_hidden_size": 16,
            "num_query_tokens": 4,
        },
    ),
}


def other_model(name: str, **config: Any) -> Any:
    """Return a random model in evaluation mode."""
    torch.manual_seed(0)
    kind, values = OTHERS[name]
    model = getattr(transformers, kind)(AutoConfig.for_model(name, **values | config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.1)
    return model.eval()


def ids(count: int = 2, length: int = 12) -> list[Tensor]:
    """Return batches of random token ids, int64 [2, length] each."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, VOCABULARY - 1, (2, length), generator=generator) for _ in range(count)
    ]


def images(count: int = 2) -> list[Tensor]:
    """Return batches of random images, fp32 [2, 3, 8, 8] each."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]
