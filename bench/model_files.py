"""The models that bench/run_model.py measures, in the files from which each variant loads them."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sq_cpu
from sq_cpu.errors import first_line
from sq_cpu.extras import require
from sq_cpu.quantization.quantize import carry_out
from sq_cpu.quantization.recipe import Recipe

SHAPES: dict[str, dict[str, int]] = {  # name -> arguments of LlamaConfig
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-1b-49k": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 49152,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}
CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 2, 256


@dataclass(frozen=True, kw_only=True)
class Files:
    """What a model's variants are loaded from, and what is known of it."""

    floats: str
    """Folder of transformers."""
    int8: dict[str, str] = field(default_factory=dict)
    """Scheme -> folder of ours, the head in float."""
    int8_head: dict[str, str] = field(default_factory=dict)
    """The same, the head in int8."""
    gguf: str | None = None
    """File in Q8_0."""
    no_gguf: str = ""
    """Why there is none."""
    layers: int
    vocabulary: int
    positions: int
    weights: int
    """Of all linears and the head: bytes in int8."""


def random_llama(shape: str, layers: int | None) -> nn.Module:
    """Build a LLaMA with tied embeddings and random weights, faster than its constructor does."""
    sizes = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.to_empty(device="cpu")
    model.tie_weights()
    # Its buffers are computed from the configuration.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)

    def fill(seed: int, parameter: nn.Parameter) -> None:
        if parameter.dim() == 1:  # of a norm
            parameter.fill_(1)
        else:
            generator = torch.Generator().manual_seed(seed)
            parameter.normal_(std=config.initializer_range, generator=generator)

    parameters = list(model.parameters())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # torch draws in a single thread
        list(pool.map(fill, range(len(parameters)), parameters))
    return model


def load_model(name: str, layers: int | None, dtype: torch.dtype) -> nn.Module:
    """Return the model of a shape's name or a folder."""
    if name in SHAPES:
        model = random_llama(name, layers)
        for parameter in model.parameters():  # not buffers: frequencies of RoPE stay in fp32
            parameter.data = parameter.data.to(dtype)
        return model
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=True)
    return model.eval().requires_grad_(False)


def random_ids(model: nn.Module, rows: int, tokens: int, seed: int) -> Tensor:
    """Return token ids [rows, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (rows, tokens), generator=generator)


def recipe_of(name: str, **options: Any) -> Recipe:
    """Return how to quantize: a scheme as a user has it, or with what its speed is compared.

    "O3-plain" rotates no input and gives no row its own scale; "O3-rotated" rotates the input of
    every down projection, as real models' outliers would have it and random weights do not.
    """
    preset, _, how = name.partition("-")
    if how == "plain":
        scheme = sq_cpu.Scheme.of(preset, dynamic_fallback=False)
        return Recipe.of(scheme, hadamard=0, **options)
    if how == "rotated":
        return Recipe.of(preset, hadamard=64, **options)
    return Recipe.of(name, **options)


def to_int8(model: nn.Module, scheme: str, **options: Any) -> nn.Module:
    """Return a quantized copy, as a user makes it: lm_head stays in float unless asked for."""
    recipe = recipe_of(scheme, **options)
    model = copy.deepcopy(model)
    windows = range(CALIBRATION_WINDOWS)
    batches = [random_ids(model, 1, CALIBRATION_TOKENS, seed=1 + window) for window in windows]
    calibration = sq_cpu.calibrate(model, batches, progress=False)
    return carry_out(model, calibration, recipe, progress=False)


def linear_weights(model: nn.Module) -> int:
    """Return how many weights the linears have, the head's among them."""
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    return sum(linear.weight.numel() for linear in linears)


def prepare(
    name: str, layers: int | None, schemes: tuple[str, ...], kinds: tuple[str, ...], folder: Path
) -> Files:
    """Write a model in bf16, and what the kinds of variants need beside it.

    A model that is in a folder is taken from there.
    """
    torch.set_grad_enabled(False)
    model = load_model(name, layers, torch.bfloat16)
    config: Any = model.config
    text = config.get_text_config()
    floats = name
    if name in SHAPES:
        floats = str(folder / "floats")
        model.save_pretrained(floats)
    int8: dict[str, str] = {}
    int8_head: dict[str, str] = {}
    for scheme in schemes:
        if "int8" in kinds:
            int8[scheme] = str(sq_cpu.save(to_int8(model, scheme), folder / scheme))
        if {"fused", "generate"} & {*kinds}:
            with_head = to_int8(model, scheme, head="int8")
            int8_head[scheme] = str(sq_cpu.save(with_head, folder / f"{scheme}-head"))
    gguf, no_gguf = None, "not asked for"
    if {"llama.cpp", "openvino"} & {*kinds}:
        gguf = str(folder / "model.gguf")
        try:
            require("gguf", "gguf")
            from gguf_file import write_gguf

            write_gguf(model, Path(gguf))
        except sq_cpu.SqCpuError as error:
            gguf, no_gguf = None, first_line(error)
    return Files(
        floats=floats,
        int8=int8,
        int8_head=int8_head,
        gguf=gguf,
        no_gguf=no_gguf,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        positions=text.max_position_embeddings,
        weights=linear_weights(model),
    )
