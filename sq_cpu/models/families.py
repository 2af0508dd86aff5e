"""Model families as data: which producer may be folded into which consumers.

A group is one producer (a norm, or a linear whose output channels reach the consumers one to one)
and *every* consumer of its output; its consumers share one smoothing scale s. A family is one row
of `FAMILIES`; no row needs code of its own. A row claims, `proof` proves on the model at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sq_cpu.errors import SqCpuError
from sq_cpu.models import decoders
from sq_cpu.models.family import Decoder, Family, Group, Rows, Stack

__all__ = ["FAMILIES", "family_of", "register_family"]


def _attention(
    norm: str | None,
    *others: str,
    at: str = "self_attn",
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    when: Mapping[str, object] | None = None,
) -> tuple[Group, ...]:
    """Return the groups of q, k, v (and what else reads their norm: `others`) and of the output."""
    q, k, v, out = (f"{at}.{name}" for name in names)
    return (
        Group(producer=norm, consumers=(q, k, v, *others), when=when or {}),
        # Attention mixes tokens, not channels, by weights that sum to 1: v's bias folds too.
        Group(producer=v, consumers=(out,), rows="value"),
    )


def _cross_attention(
    norm: str | None, at: str, names: tuple[str, str, str, str]
) -> tuple[Group, ...]:
    """Return the groups where k and v read another model's output, as they do in every block.

    One s for all blocks could be folded into that model's last norm; one for each fits better.
    """
    q, k, v, out = (f"{at}.{name}" for name in names)
    return (
        Group(producer=norm, consumers=(q,)),
        Group(producer=None, consumers=(k, v)),
        Group(producer=v, consumers=(out,), rows="value"),
    )


def _fused_attention(
    norm: str, qkv: str, out: str, rows: Rows, when: Mapping[str, object] | None = None
) -> tuple[Group, ...]:
    return (
        Group(producer=norm, consumers=(qkv,), when=when or {}),
        Group(producer=qkv, consumers=(out,), rows=rows),
    )


def _gated(norm: str | None, *others: str, at: str = "mlp") -> tuple[Group, ...]:
    """Return the groups of gate, up (and what else reads their input: `others`) and of down."""
    return (
        Group(producer=norm, consumers=(f"{at}.gate_proj", f"{at}.up_proj", *others)),
        # down's input is act(gate) * up: linear in up, whatever the activation function.
        Group(producer=f"{at}.up_proj", consumers=(f"{at}.down_proj",)),
    )


def _two_layers(
    norm: str,
    fc1: str,
    fc2: str,
    activation: Mapping[str, object] | None = None,
    when: Mapping[str, object] | None = None,
) -> tuple[Group, ...]:
    """Return the groups of fc2(act(fc1(x))); `activation` is what makes act a ReLU, if anything."""
    first = Group(producer=norm, consumers=(fc1,), when=when or {})
    if activation is None:
        return (first,)
    # relu(x / s) = relu(x) / s for s > 0, and for no smoother activation function.
    return (first, Group(producer=fc1, consumers=(fc2,), when=activation))


_NORM_1, _NORM_2 = "input_layernorm", "post_attention_layernorm"

_FUSED_GATED = (
    Group(producer=_NORM_2, consumers=("mlp.gate_up_proj",)),
    Group(producer="mlp.gate_up_proj", consumers=("mlp.down_proj",), rows="second_half"),
)

# The norm before a mixture of experts is left alone: one s for all experts degrades perplexity.
_EXPERTS = (
    Group(
        producer="mlp.experts.*.gate_up_proj",
        consumers=("mlp.experts.*.down_proj",),
        rows="second_half",
    ),
    Group(producer=None, consumers=("mlp.experts.*.gate_up_proj",)),
)

_GEMMA_2 = (*_attention(_NORM_1), *_gated("pre_feedforward_layernorm"))

_OUT_PROJ = ("q_proj", "k_proj", "v_proj", "out_proj")

# CLIP's text and vision models, and SigLIP, which is Gemma 3's vision model.
_CLIP = (
    *_attention("layer_norm1", names=_OUT_PROJ),
    *_two_layers("layer_norm2", "mlp.fc1", "mlp.fc2"),
)

_T5 = ("q", "k", "v", "o")


def _t5_mlp(layer: str) -> tuple[Group, ...]:
    norm, at = f"{layer}.layer_norm", f"{layer}.DenseReluDense"
    relu = {"is_gated_act": False, "dense_act_fn": "relu"}
    return (
        Group(producer=norm, consumers=(f"{at}.wi_0", f"{at}.wi_1")),
        Group(producer=f"{at}.wi_1", consumers=(f"{at}.wo",), when={"is_gated_act": True}),
        *_two_layers(norm, f"{at}.wi", f"{at}.wo", relu),
    )


_WHISPER_MLP = _two_layers("final_layer_norm", "fc1", "fc2", {"activation_function": "relu"})

# Otherwise a norm's output is the residual too, which nothing may rescale.
_OPT = {"do_layer_norm_before": True}
_BLOOM = {"apply_residual_connection_post_layernorm": False}


def _family(
    model_types: tuple[str, ...], blocks: str, *groups: Group, decoder: Decoder | None = None
) -> Family:
    stack = Stack(blocks=blocks, groups=groups)
    return Family(model_types=model_types, stacks=(stack,), decoder=decoder)


FAMILIES: list[Family] = [
    _family(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3"),
        "layers",
        *_attention(_NORM_1),
        *_gated(_NORM_2),
        decoder=decoders.LLAMA,
    ),
    _family(("granite",), "layers", *_attention(_NORM_1), *_gated(_NORM_2), decoder=decoders.LLAMA),
    _family(("mixtral",), "layers", *_attention(_NORM_1), *_EXPERTS, decoder=decoders.MIXTRAL),
    _family(
        ("olmoe",),
        "layers",
        Group(
            producer=_NORM_1, consumers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        ),
        # Clipping is linear only until a value reaches the clip.
        Group(
            producer="self_attn.v_proj",
            consumers=("self_attn.o_proj",),
            rows="value",
            when={"clip_qkv": None},
        ),
        *_EXPERTS,
        decoder=decoders.OLMOE,
    ),
    _family(
        ("qwen2_moe", "qwen3_moe"),
        "layers",
        *_attention(_NORM_1),
        *_gated(_NORM_2),  # of the blocks without experts
        *_EXPERTS,
        *_gated(None, "mlp.shared_expert_gate", at="mlp.shared_expert"),
        decoder=decoders.QWEN_MOE,
    ),
    _family(
        ("deepseek_v2", "deepseek_v3"),
        "layers",
        Group(
            producer=_NORM_1,
            consumers=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        ),
        Group(
            producer=_NORM_1,
            consumers=("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"),
            when={"q_lora_rank": None},
        ),
        Group(producer="self_attn.q_a_layernorm", consumers=("self_attn.q_b_proj",)),
        Group(producer="self_attn.kv_a_layernorm", consumers=("self_attn.kv_b_proj",)),
        Group(producer="self_attn.kv_b_proj", consumers=("self_attn.o_proj",), rows="last_of_head"),
        *_gated(_NORM_2),  # of the first blocks, which have no experts
        *_EXPERTS,
        *_gated(None, at="mlp.shared_experts"),
    ),
    _family(
        ("phi",),
        "layers",
        *_attention(_NORM_1, "mlp.fc1", names=("q_proj", "k_proj", "v_proj", "dense")),
        Group(producer="mlp.fc1", consumers=("mlp.fc2",), when={"hidden_act": "relu"}),
        decoder=decoders.PHI,
    ),
    _family(
        ("phi3",),
        "layers",
        *_fused_attention(_NORM_1, "self_attn.qkv_proj", "self_attn.o_proj", "qkv"),
        *_FUSED_GATED,
        decoder=decoders.PHI3,
    ),
    # In both, post_attention_layernorm is the norm before the MLP.
    _family(
        ("glm",),
        "layers",
        *_attention(_NORM_1),
        *_FUSED_GATED,
        decoder=decoders.GLM,
    ),
    _family(
        ("glm4",),
        "layers",
        *_attention(_NORM_1),
        *_FUSED_GATED,
        decoder=decoders.GLM4,
    ),
    Family(
        model_types=("gemma",),
        stacks=(
            Stack(
                blocks="layers",
                groups=(*_attention(_NORM_1), *_gated(_NORM_2)),
                norm_offset=1.0,
            ),
        ),
        decoder=decoders.LLAMA,
    ),
    # Here post_attention_layernorm normalises attention's output, which goes to the residual.
    Family(
        model_types=("gemma2", "gemma3_text"),
        stacks=(Stack(blocks="layers", groups=_GEMMA_2, norm_offset=1.0),),
        decoder=decoders.GEMMA_2,
    ),
    Family(
        model_types=("gemma3",),
        stacks=(
            Stack(blocks="layers", groups=_GEMMA_2, norm_offset=1.0),
            Stack(blocks="language_model.layers", groups=_GEMMA_2, norm_offset=1.0),
            Stack(blocks="vision_tower.encoder.layers", groups=_CLIP),
        ),
    ),
    # Norms follow attention and MLP here: q, k, v and gate, up read the residual itself.
    _family(("olmo2",), "layers", *_attention(None), *_gated(None), decoder=decoders.OLMO_2),
    _family(
        ("stablelm",),
        "layers",
        *_attention(_NORM_1, when={"use_parallel_residual": False}),
        *_gated(_NORM_2),
        Group(
            producer=_NORM_1,
            consumers=(
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
            ),
            when={"use_parallel_residual": True},
        ),
        decoder=decoders.STABLELM,
    ),
    _family(
        ("opt",),
        "decoder.layers",
        *_attention("self_attn_layer_norm", names=_OUT_PROJ, when=_OPT),
        *_two_layers("final_layer_norm", "fc1", "fc2", {"activation_function": "relu"}, when=_OPT),
        decoder=decoders.OPT,
    ),
    _family(
        ("bloom",),
        "h",
        *_fused_attention(
            _NORM_1,
            "self_attention.query_key_value",
            "self_attention.dense",
            "qkv_by_head",
            when=_BLOOM,
        ),
        *_two_layers(_NORM_2, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", when=_BLOOM),
        decoder=decoders.BLOOM,
    ),
    _family(
        ("gpt2",),
        "h",
        *_fused_attention("ln_1", "attn.c_attn", "attn.c_proj", "qkv"),
        *_two_layers("ln_2", "mlp.c_fc", "mlp.c_proj", {"activation_function": "relu"}),
        decoder=decoders.GPT2,
    ),
    _family(
        ("gptj",),
        "h",
        *_attention("ln_1", "mlp.fc_in", at="attn", names=_OUT_PROJ),
        Group(
            producer="mlp.fc_in", consumers=("mlp.fc_out",), when={"activation_function": "relu"}
        ),
        decoder=decoders.GPTJ,
    ),
    # Parallel residual or not, attention and MLP have a norm each.
    _family(
        ("gpt_neox",),
        "layers",
        *_fused_attention(_NORM_1, "attention.query_key_value", "attention.dense", "qkv_by_head"),
        *_two_layers(_NORM_2, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", {"hidden_act": "relu"}),
        decoder=decoders.GPT_NEOX,
    ),
    _family(
        ("falcon",),
        "h",
        # Two norms (the new decoder architecture); one after the other; one norm for both.
        Group(producer="ln_attn", consumers=("self_attention.query_key_value",)),
        Group(producer="ln_mlp", consumers=("mlp.dense_h_to_4h",)),
        Group(
            producer=_NORM_1,
            consumers=("self_attention.query_key_value",),
            when={"parallel_attn": False},
        ),
        Group(producer=_NORM_2, consumers=("mlp.dense_h_to_4h",)),
        Group(
            producer=_NORM_1,
            consumers=("self_attention.query_key_value", "mlp.dense_h_to_4h"),
            when={"parallel_attn": True},
        ),
        # One key-value head (multi-query) is one part, as many as query heads are the old layout.
        Group(
            producer="self_attention.query_key_value",
            consumers=("self_attention.dense",),
            rows="qkv_by_head",
        ),
        Group(
            producer="mlp.dense_h_to_4h",
            consumers=("mlp.dense_4h_to_h",),
            when={"activation": "relu"},
        ),
        decoder=decoders.FALCON,
    ),
    _family(
        ("mpt",),
        "blocks",
        Group(producer="norm_1", consumers=("attn.Wqkv",)),
        # Clipping is linear only until a value reaches the clip: no example can prove it.
        Group(
            producer="attn.Wqkv",
            consumers=("attn.out_proj",),
            rows="qkv",
            when={"attn_config.clip_qkv": None},
        ),
        *_two_layers("norm_2", "ffn.up_proj", "ffn.down_proj"),
        decoder=decoders.MPT,
    ),
    # Post-norm: every norm's output is the residual too.
    _family(
        ("bert", "roberta"),
        "encoder.layer",
        Group(
            producer=None,
            consumers=(
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
            ),
        ),
        Group(producer="attention.self.value", consumers=("attention.output.dense",), rows="value"),
        Group(
            producer="intermediate.dense", consumers=("output.dense",), when={"hidden_act": "relu"}
        ),
    ),
    Family(
        model_types=("t5",),
        stacks=(
            Stack(
                blocks="encoder.block",
                groups=(
                    *_attention("layer.0.layer_norm", at="layer.0.SelfAttention", names=_T5),
                    *_t5_mlp("layer.1"),
                ),
            ),
            Stack(
                blocks="decoder.block",
                groups=(
                    *_attention("layer.0.layer_norm", at="layer.0.SelfAttention", names=_T5),
                    *_cross_attention("layer.1.layer_norm", "layer.1.EncDecAttention", _T5),
                    *_t5_mlp("layer.2"),
                ),
            ),
        ),
    ),
    Family(
        model_types=("whisper",),
        stacks=(
            Stack(
                blocks="encoder.layers",
                groups=(
                    *_attention("self_attn_layer_norm", names=_OUT_PROJ),
                    *_WHISPER_MLP,
                ),
            ),
            Stack(
                blocks="decoder.layers",
                groups=(
                    *_attention("self_attn_layer_norm", names=_OUT_PROJ),
                    *_cross_attention("encoder_attn_layer_norm", "encoder_attn", _OUT_PROJ),
                    *_WHISPER_MLP,
                ),
            ),
        ),
    ),
    _family(
        ("vit",),
        "layers",
        *_attention("layernorm_before", at="attention"),
        *_two_layers("layernorm_after", "mlp.fc1", "mlp.fc2", {"hidden_act": "relu"}),
    ),
    Family(
        model_types=("clip", "clip_text_model", "clip_vision_model"),
        stacks=tuple(
            Stack(blocks=blocks, groups=_CLIP)
            for blocks in (
                "text_model.encoder.layers",
                "vision_model.encoder.layers",
                "encoder.layers",
            )
        ),
    ),
]


def register_family(family: Family) -> None:
    """Add a row, which comes before those of the same model types."""
    if not isinstance(family, Family):
        raise SqCpuError(f"register_family takes a Family, not a {type(family).__name__}")
    FAMILIES.insert(0, family)


def family_of(model: nn.Module) -> Family | None:
    """Return the row of a model, by its config's model type or its class's name; None: no row."""
    config: Any = getattr(model, "config", None)
    names = (getattr(config, "model_type", None), type(model).__name__)
    for family in FAMILIES:
        if any(name in family.model_types for name in names):
            return family
    return None
