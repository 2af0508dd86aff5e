"""Whisper base from its packages: CTranslate2's file as a transformers model, speech to feed it."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from sq_cpu.errors import SqCpuError

SAMPLE_RATE = 16_000
START, TRANSCRIBE, NO_TIMESTAMPS, END = 50258, 50359, 50363, 50257
_LANGUAGES = {  # folder of recordings -> <|en|> and so on
    "en": 50259,
    "zh": 50260,
    "es": 50262,
    "fr": 50265,
    "ja": 50266,
    "pt": 50267,
    "pl": 50269,
    "it": 50274,
    "hi": 50276,
}
PROMPT = 4  # tokens
_MAX_TOKENS = 64
_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
_FLOAT = (np.float32, np.float16)
_IEEE_FLOAT = 3  # WAVE format tag


def read_ctranslate2(content: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Read a CTranslate2 model.bin: a flat list of named arrays, then names that share one."""
    offset = 0

    def number(form: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from(f"<{form}", content, offset)
        offset += struct.calcsize(form)
        return int(value)

    def string() -> str:
        nonlocal offset
        size = number("H")
        text = content[offset : offset + size - 1]  # it ends with a zero
        offset += size
        return text.decode()

    if (version := number("I")) != 6:
        raise SqCpuError(f"CTranslate2 binary version {version}: only 6 is read")
    string()  # the architecture
    number("I")  # its revision
    arrays = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype = _DTYPES[number("B")]
        size = number("I")
        count = size // np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(content, dtype, count, offset).reshape(shape)
        offset += size
    for _ in range(number("I")):
        alias = string()
        arrays[alias] = arrays[string()]
    if offset != len(content):
        raise SqCpuError(f"the CTranslate2 model ends at byte {offset} of {len(content)}")
    return arrays


_BLOCK = {  # CTranslate2's name in a layer -> transformers'
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_FUSED = {
    "self_attention/linear_0": [f"self_attn.{letter}_proj" for letter in "qkv"],
    "attention/linear_1": [f"encoder_attn.{letter}_proj" for letter in "kv"],
}
_OUTSIDE = {
    "embeddings": "embed_tokens",
    "projection": "proj_out",
    "position_encodings": "embed_positions",
    "layer_norm": "layer_norm",
    "conv1": "conv1",
    "conv2": "conv2",
}
_KINDS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def to_transformers(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    """Return the state dict of a WhisperForConditionalGeneration, fp32.

    K's bias, which transformers' model lacks, must be zero.
    """
    state = {}
    for path, array in arrays.items():
        if array.dtype not in _FLOAT or array.ndim == 0:
            continue  # sizes and switches, which the config has
        stack, _, rest = path.partition("/")
        module, _, last = rest.rpartition("/")
        kind = _KINDS.get(last, last)
        tensor = torch.from_numpy(array.astype(np.float32))
        if module == "projection":
            state[f"proj_out.{kind}"] = tensor
            continue
        if not module.startswith("layer_") or module == "layer_norm":
            state[f"model.{stack}.{_OUTSIDE[module]}.{kind}"] = tensor
            continue
        layer, _, module = module.partition("/")
        prefix = f"model.{stack}.layers.{layer.removeprefix('layer_')}."
        if module not in _FUSED:
            state[f"{prefix}{_BLOCK[module]}.{kind}"] = tensor
            continue
        names = _FUSED[module]
        for name, part in zip(names, tensor.chunk(len(names)), strict=True):
            if not name.endswith("k_proj") or kind == "weight":
                state[f"{prefix}{name}.{kind}"] = part.clone()
            elif part.any():
                raise SqCpuError(f"{path}: k has a bias, which transformers' Whisper has not")
    return state


def make_model(parts: Sequence[Path]) -> WhisperForConditionalGeneration:
    """Build Whisper base, fp32, from the pieces of its model.bin."""
    state = to_transformers(read_ctranslate2(b"".join(part.read_bytes() for part in parts)))
    config = WhisperConfig(  # base
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        vocab_size=len(state["proj_out.weight"]),
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state)
    return model.eval()


def read_wav(file: Path) -> np.ndarray[Any, Any]:
    """Read mono float samples at 16 kHz; `SqCpuError` on any other WAV."""
    content = file.read_bytes()
    offset, samples = 12, None
    while offset + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, offset)
        body = content[offset + 8 : offset + 8 + size]
        if kind == b"fmt ":
            form, channels, rate = struct.unpack_from("<HHI", body)
            if (form, channels, rate) != (_IEEE_FLOAT, 1, SAMPLE_RATE):
                raise SqCpuError(f"{file}: not mono float samples at {SAMPLE_RATE} Hz")
        elif kind == b"data":
            samples = np.frombuffer(body, np.float32)
        offset += 8 + size + size % 2
    if samples is None:
        raise SqCpuError(f"{file}: no samples in it")
    return samples


@torch.no_grad()
def transcribe(model: WhisperForConditionalGeneration, file: Path) -> dict[str, Tensor]:
    """Return a recording with the model's own greedy transcript, as the model's arguments.

    The language is the name of the recording's folder. `decoder_input_ids` begins with the four
    tokens of the prompt (`PROMPT` of them) and leaves out the end-of-text token.
    """
    features = WhisperFeatureExtractor()(
        read_wav(file), sampling_rate=SAMPLE_RATE, return_tensors="pt"
    ).input_features
    ids = [START, _LANGUAGES[file.parent.name], TRANSCRIBE, NO_TIMESTAMPS]
    encoded = model.model.encoder(features)
    cache, step = None, ids
    for _ in range(_MAX_TOKENS):
        output = model(
            encoder_outputs=encoded,
            decoder_input_ids=torch.tensor([step]),
            past_key_values=cache,
            use_cache=True,
        )
        cache, step = output.past_key_values, [int(output.logits[0, -1].argmax())]
        if step == [END]:
            break
        ids += step
    return {"input_features": features, "decoder_input_ids": torch.tensor([ids])}
