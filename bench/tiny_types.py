"""A tiny random model of any model type of transformers, and inputs that its forward takes.

Sizes are shrunk by what their names say, throughout nested configurations, so that those which have
to be equal stay equal. `OVERRIDES` has what that cannot find.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import count
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

WIDTH, HEADS, HEAD_WIDTH, FFN, VOCABULARY, LAYERS = 32, 4, 8, 64, 128, 2
MOST_LAYERS = 4
BATCH = 2
ORDINARY = 48
"""Token ids below are text; those of special tokens lie above."""
LARGEST = 50_000_000
"""Parameters of a model that is still called tiny."""

# The first that has a model type gives the class to try first.
HEADS_OF = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "CAUSAL_LM",
    "MASKED_LM",
    "CTC",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
)

_KV_HEADS = r"(.*_)?(kv_heads|key_value_heads|query_groups|key_heads)"

Shrink = int | Callable[[int], int] | None

# Of integer settings: a pattern that the whole name matches, and its value; the first counts. A
# setting that is smaller stays.
_RULES: tuple[tuple[str, Shrink], ...] = (
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_hash_layers", 0),
    (r"first_k_dense_replace|num_dense_layers|n_group|topk_group|moe_layer_start_index", 1),
    (r"num_feat_extract_layers|max_window_layers|num_conv_pos_embeddings?(_groups)?", None),
    (r".*(head_dim|dim_head|d_head|d_kv|head_size|headdim|kv_channels)|d_rel", HEAD_WIDTH),
    (r"mamba_(n|num)_heads|n_mamba_heads|mamba_d_head", 8),
    (r"mamba_d_ssm|ssm_inner_size", 2 * WIDTH),
    (_KV_HEADS, HEADS // 2),
    (r"(.*_)?(heads?|n_head|num_heads?|attention_heads)(_ipa)?", HEADS),
    (r".*(layers|n_layer|depth|num_blocks|num_layers_per_stack|self_attends_per_block)", LAYERS),
    (r".*vocab(_size)?(_.*)?|num_embeds", VOCABULARY),
    (r"index_topk(_blocks)?", 8),
    (r"index_kpool", 2),
    (r".*experts_per_tok|.*top_?k(_experts)?|moe_k", 2),
    (r".*(num|n)_.*experts|num_experts|.*num_local_experts", 4),
    (r".*(intermediate|ffn|mlp|feed_?forward|d_ff|dff|moe_hidden|linear_units|d_inner).*", FFN),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size", 8),
    (r".*(_rank|rank)", 16),
    (r"num_mel_bins|n_mel_bins|mel_dim|input_feat_per_channel|input_feat_size", 16),
    (r"max_source_positions|max_target_positions", 64),
    (r".*position.*|n_ctx|n_positions|max_seq_len|seq_len|.*context_length", 256),
    (r"image_size|img_size|pretrain_image_size", 32),
    (r"patch_size", 8),
    (r"num_frames|frames_per_clip", 4),
    (r".*rotary_dim", HEAD_WIDTH),
    (r"max_length|max_text_len(gth)?", 64),
    (r"num_windows|num_groups", 4),
    (r"upsample_groups", WIDTH),
    (r".*filters|n_filters", 8),
    (r"window_size", lambda value: 4 * HEAD_WIDTH if value > 64 else min(value, 8)),
    (r".*window_size|sliding_window.*|attention_window|local_attention", 8),
    (r"num_queries|num_query_tokens|.*num_latents|num_denoising|num_detection_tokens", 6),
    (r"mm_tokens_per_image", 4),
    (r"codebook_size|num_embeddings|.*num_buckets|num_codevectors_per_group", 64),
    (
        r".*(kernel|stride|chunk|block|window|crop|temperature|group|_ids?|_rate|multiple|ratio).*",
        None,
    ),
    (
        r".*(width|channels?|d_model|n_embd|dim|units|planes|features|_size|hidden|embd)"
        r"(_.*)?|dim|d_latents",
        WIDTH,
    ),
)

_RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
}
_ONE_RESNET = _RESNET | {
    "backbone_config": {**_RESNET["backbone_config"], "out_features": ["stage4"]}
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_ROPES = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
_SERIES = {"prediction_length": 8, "context_length": 16, "num_time_features": 1}
_MIXTURE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}
_TOKENS = {str(token): token for token in range(100, VOCABULARY)}

OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 100},
    "bridgetower": {
        "hidden_size": 64,
        "text_config": {"hidden_size": 64},
        "vision_config": {"hidden_size": 64},
    },
    "bridgetower_vision_model": {"hidden_size": 64},
    "chameleon": {"vocabulary_map": _TOKENS | {"<image>": 99}},
    "conditional_detr": _ONE_RESNET,
    "cvt": {"depth": [1, 2, 3]},
    "dab-detr": _ONE_RESNET,
    "dots3_note": {"text_config": {"head_dim": 2 * HEAD_WIDTH}},
    "dots3_note_text": {"head_dim": 2 * HEAD_WIDTH},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deformable_detr": _RESNET,
    "cohere_compass": {"text_config": _ROPES},
    "cohere_compass_text": _ROPES,
    "depth_anything": {"backbone_config": {"reshape_hidden_states": False}},
    "detr": _ONE_RESNET,
    "dots1": _MIXTURE,
    "emu3": {"vocabulary_map": _TOKENS | {"<image>": 99}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "glm4v": {"text_config": _MROPE},
    "glm_image_text": _MROPE,
    "glm_ocr": {"text_config": _MROPE},
    "glmga": {"text_config": _MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "informer": _SERIES,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "paddleocr_vl": {"text_config": _MROPE},
    "paddleocr_vl_text": _MROPE,
    "pix2struct_text_model": {"initializer_range": 0.02},
    "prompt_depth_anything": {"backbone_config": {"reshape_hidden_states": False}},
    "qwen2_5_omni_talker": _MROPE,
    "qwen2_5_omni_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen2_vl": {"text_config": _MROPE},
    "qwen2_5_vl": {"text_config": _MROPE},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "max_position_embeddings": 16,
    },
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "table-transformer": _ONE_RESNET,
    "time_series_transformer": _SERIES,
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "zoedepth": {"backbone_config": {"reshape_hidden_states": False}},
}
"""By model type: what the default configuration needs beside the shrunk values."""

UNBUILT: frozenset[str] = frozenset()
"""Types whose configuration is none without those."""


def _of_rules(name: str, value: int) -> int:
    for pattern, size in _RULES:
        if re.fullmatch(pattern, name):
            if callable(size):
                return size(value)
            return value if size is None else min(value, size)
    return value


class _Shrinker:
    """Shrinks the configurations of one model: a special token has one new id throughout."""

    def __init__(self, rule: Callable[[str, int], int]) -> None:
        self._rule = rule
        self._ids: dict[int, int] = {}
        self._free = count(ORDINARY + 16)

    def settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return what differs from the default configuration of this class."""
        values = _values(config)
        default = _default(type(config))
        layers = self._layers(values)
        changed: dict[str, Any] = {}
        if stages := list(getattr(config, "_out_indices", None) or []):  # a backbone's
            if layers and len(stages) > 1:
                layers = list(range(max(len(stages), LAYERS)))
            last = len(layers)
            changed["out_indices"] = stages if not layers else [*range(1, last + 1)][-len(stages) :]
        for name, value in values.items():
            new = self._new(name, value, layers)
            if name in _DEPTHS and layers:
                new = len(layers)
            if isinstance(value, PreTrainedConfig) or new != default.get(name):
                changed[name] = new
        return changed

    def _layers(self, values: dict[str, Any]) -> list[int]:
        """Return which layers stay: two, and more where more kinds differ."""
        depth = next((values[name] for name in _DEPTHS if values.get(name)), None)
        if not isinstance(depth, int) or depth <= LAYERS:
            return []
        lists = [v for v in values.values() if isinstance(v, list | tuple) and len(v) == depth]
        special = values.get("per_layer_config") or {}
        special = {int(key): value for key, value in special.items()}
        kinds = [str([*(v[i] for v in lists), special.get(i)]) for i in range(depth)]
        picked = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:MOST_LAYERS]
        return picked if len(picked) >= LAYERS else list(range(LAYERS))

    def _new(self, name: str, value: Any, layers: list[int]) -> Any:
        if isinstance(value, PreTrainedConfig):
            return self.settings(value) | {"model_type": value.model_type}
        if isinstance(value, bool) or name in ("id2label", "label2id"):
            return value
        if value is None:
            return self._rule(name, 1 << 20) if name in _DERIVED else None
        if isinstance(value, int):
            if re.fullmatch(r".*(token_id|token_index|_id|_token)", name):
                return self._id(value)
            return self._rule(name, value)
        if name == "per_layer_config":
            own = {int(key): item for key, item in value.items()}
            return {
                new: self._new("", own[old], []) for new, old in enumerate(layers) if old in own
            }
        if isinstance(value, dict):
            return {key: self._new(str(key), item, layers) for key, item in value.items()}
        if isinstance(value, list | tuple) and value:
            return type(value)(self._list(name, list(value), layers))
        return value

    def _id(self, value: int) -> int:
        if value < ORDINARY:
            return value
        if value not in self._ids:
            self._ids[value] = next(self._free)
        return self._ids[value]

    def _list(self, name: str, values: list[Any], layers: list[int]) -> list[Any]:
        if layers and len(values) > max(layers) and len(values) > 8:  # an entry a layer
            values = [values[index] for index in layers]
            if all(type(value) is int for value in values):
                return [self._rule(name, value) for value in values]
            return values
        if not all(type(value) is int for value in values):
            return values
        if name.endswith("token_ids"):
            return [self._id(value) for value in values]
        if name == "mrope_section":
            return [2, 1, 1]
        if re.search(r"depth|num_block|layers_per|blocks_per|numb_of_layers", name):
            return [min(value, 1) for value in values]
        if re.search(r"ind(ex|ic)|idx|layers?$|_ids$", name):
            return list(dict.fromkeys(min(value, LAYERS - 1) for value in values))
        if "heads" in name and len(set(values)) > 1:
            return [max(1, value // min(values)) for value in values]
        if "heads" in name or "experts" in name:
            return [self._rule(name, value) for value in values]
        if self._rule is _depth_and_vocabulary or re.search(_FIXED, name):
            return values
        if re.search(r"dim|size|channel|width|filters", name) and min(values) >= 16:
            if re.search(r"kernel|patch|image|window|feat_size", name):
                return [min(value, 32) for value in values]
            return [max(16, value * 16 // min(values) // 8 * 8) for value in values]
        return values


# Widths of a convolutional backbone, and of what follows it, that only fit as they are.
_FIXED = r"^stage_|^stem|^encoder_in_channels$"
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
# Where the default is None, classes fail or take what is not tiny.
_DERIVED = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts")


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of a configuration, nested ones as they are."""
    names = [f.name for f in fields(config)] if is_dataclass(config) else list(vars(config))
    names += [name for name in type(config).sub_configs if name not in names]
    values: dict[str, Any] = {}
    for name in names:
        if name.startswith("_"):
            continue
        try:
            values[name] = getattr(config, name)
        except AttributeError:
            continue
        except RuntimeError:  # a setting that differs from layer to layer
            values[name] = config.to_dict().get(name)
    if special := config.to_dict().get("per_layer_config"):
        values["per_layer_config"] = special
    return values


@cache
def _default(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    try:
        return _values(kind())
    except Exception:  # a configuration that has no default
        return {}


def _depth_and_vocabulary(name: str, value: int) -> int:
    small = r".*(layers|vocab_size|n_layer|depth|experts|positions?(_embeddings)?|num_queries)"
    if re.fullmatch(r"(.*_)?(image|img)_size", name):
        return min(value, 64)
    return _of_rules(name, value) if re.fullmatch(small, name) else value


def _equal_heads(name: str, value: int) -> int:
    return HEADS if re.fullmatch(_KV_HEADS, name) and value > HEADS else _of_rules(name, value)


ATTEMPTS = (_of_rules, _equal_heads, _depth_and_vocabulary)
"""Ways to shrink: all sizes, all but with as many key and value heads, depth and vocabulary."""


def tiny_config(model_type: str, attempt: int = 0) -> PreTrainedConfig:
    """Return a configuration shrunk in one of the ways of `ATTEMPTS`."""
    kind = CONFIG_MAPPING[model_type]
    override = OVERRIDES.get(model_type, {})
    default = kind(**override) if model_type in UNBUILT else kind()
    return kind(**_merged(_Shrinker(ATTEMPTS[attempt]).settings(default), override))


def _merged(settings: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in override.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        nested = nested and "model_type" not in value  # another kind of configuration
        merged[name] = _merged(merged[name], value) if nested else value
    return merged


def model_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """Return the classes of a model type, the best head first."""
    names: list[str] = []
    for head in HEADS_OF:
        names += _named(getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES").get(model_type))
    names += _named(modeling_auto.MODEL_MAPPING_NAMES.get(model_type))
    for mapping in dir(modeling_auto):
        if re.fullmatch("MODEL_FOR_.*MAPPING_NAMES", mapping):
            names += _named(getattr(modeling_auto, mapping).get(model_type))
    classes = [getattr(transformers, name, None) for name in dict.fromkeys(names)]
    found = [kind for kind in classes if kind is not None]
    return found or _classes_of_config(CONFIG_MAPPING[model_type])


def _named(value: str | Iterable[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _classes_of_config(config: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """Return the classes that no mapping names: parts of other models."""
    package = config.__module__.rpartition(".")[0]
    name = config.__module__.rpartition(".configuration_")[2]
    try:
        module = importlib.import_module(f"{package}.modeling_{name}")
    except ImportError:
        return []
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and getattr(value, "config_class", None) is config
        and not inspect.isabstract(value)
        and not value.__name__.endswith("PreTrainedModel")
    ]
    return sorted(found, key=lambda value: not hasattr(transformers, value.__name__))


def tiny_model(kind: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0) -> Any:
    """Return a random model in fp32 whose norms and biases are random too, unlike a fresh one's.

    Raises `ValueError` for one that is not tiny.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters are not tiny")
    torch.manual_seed(seed)
    model: Any = kind._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            linear = isinstance(module, nn.Linear)
            for parameter in module.parameters(recurse=False):
                noise = torch.randn_like(parameter)
                if linear and parameter.dim() == 2:
                    parameter.copy_(noise * parameter.shape[1] ** -0.5)
                elif linear or "Norm" in type(module).__name__:
                    parameter.add_(0.2 * noise)
                elif not parameter.isfinite().all() or parameter.eq(parameter.mean()).all():
                    parameter.nan_to_num_(0.0, 0.0, 0.0).add_(0.1 * noise)
    return model.eval()
