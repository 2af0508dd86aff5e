"""A LLaMA of transformers as a GGUF file with weights in Q8_0, for the peers that read those.

The vocabulary's texts are made up: prompts and answers are ids.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError

_Q8_0 = gguf.GGMLQuantizationType.Q8_0
_PIECE = 1 << 19  # weights
_BLOCK_NAMES = {  # llama.cpp's -> transformers'
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def check_convertible(config: Any) -> None:
    """Raise `SqCpuError` for a model that this file's rows do not describe."""
    if config.model_type != "llama":
        raise SqCpuError(f"only LLaMAs are written as GGUF here, and it is a {config.model_type}")
    rope = config.rope_parameters["rope_type"]
    if rope != "default":
        raise SqCpuError(f"only the default rotary embedding is written as GGUF here, not {rope}")
    if config.attention_bias or config.mlp_bias:
        raise SqCpuError("linears with biases are not written as GGUF here")


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    # An end, all bytes, written as GPT-2 does, then names that no text has.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    texts = ["<|end|>", *map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    texts += [f"<{i}>" for i in range(len(texts), size)]
    kinds = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (size - 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(texts[:size])
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{texts[1]} {texts[2]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder a head's rows: llama.cpp turns neighbours, transformers the halves of a head."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _quantized(weight: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Quantize to Q8_0 in pieces that stay in the caches, on all cores."""
    pieces = np.array_split(weight, -(-weight.size // _PIECE))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return np.concatenate(
            list(pool.map(lambda rows: gguf.quants.quantize(rows, _Q8_0), pieces))
        )


def write_gguf(model: nn.Module, path: Path) -> None:
    """Write a LLaMA in fp32; norms stay in fp32."""
    config: Any = model.config
    check_convertible(config)
    writer = gguf.GGUFWriter(path, "llama")
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    _add_vocabulary(writer, config.vocab_size)

    def add(name: str, source: str, heads: int | None = None) -> None:
        parameter: Tensor = model.get_parameter(source)
        values: NDArray[np.float32] = parameter.detach().float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
            return
        if heads is not None:
            values = _interleaved(values, heads)
        writer.add_tensor(name, _quantized(values), raw_dtype=_Q8_0)

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        add("output.weight", "lm_head.weight")
    turned = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for block in range(config.num_hidden_layers):
        for name, source in _BLOCK_NAMES.items():
            heads = turned.get(name)
            add(f"blk.{block}.{name}.weight", f"model.layers.{block}.{source}.weight", heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
