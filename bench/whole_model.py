"""Prefill and decode of one causal language model, in int8 beside torch's fp32 and bf16.

Of sq_cpu only public names are used: the same code measures an older build.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from harness import Candidate, Stats, interleave
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sq_cpu

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
}
FP32, BF16 = "fp32", "bf16"
FLOATS = FP32, BF16
LEAST_COSINE = 0.9
"""What faults do not reach: SmolLM2's own weights in O3 came to 0.945 after random tokens."""
CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 2, 256
# Of the time for a measurement, what `interleave` gets: it also plans, and readies each call.
_TIMED_SHARE = 0.7

Work = Literal["prefill", "decode"]
Row = dict[str, Any]
Models = dict[str, nn.Module]
"""Variant -> model: "fp32", "bf16", and for int8 the scheme and all else's dtype, "O3 bf16"."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured of every model."""

    layers: int | None
    """Of a shape; None is its own number."""
    schemes: tuple[str, ...]
    prompt: int
    """Tokens of the prefill."""
    context: int
    """Tokens in the cache before the first decoded one."""
    tokens: int
    """Decoding steps of a timed call."""
    rows: tuple[int, ...]
    """Sequences that are decoded at once."""
    least_cosine: float
    """Of a variant's logits with those of fp32."""
    fused: bool = False
    """Whether int8 is measured as one native call, too, with an int8 head and attention."""


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


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


def load_model(name: str, layers: int | None) -> nn.Module:
    """Return the fp32 model of a shape's name or a folder."""
    if name in SHAPES:
        return random_llama(name, layers)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False)


def to_bf16(model: nn.Module) -> nn.Module:
    """Return a copy as from_pretrained loads it in bf16: the frequencies of RoPE stay in fp32."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def random_ids(model: nn.Module, rows: int, tokens: int, seed: int) -> Tensor:
    """Return token ids [rows, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (rows, tokens), generator=generator)


def to_int8(model: nn.Module, scheme: str, **options: Any) -> nn.Module:
    """Return a quantized copy, as a user makes it: lm_head stays in float unless asked for."""
    model = copy.deepcopy(model)
    windows = range(CALIBRATION_WINDOWS)
    batches = [random_ids(model, 1, CALIBRATION_TOKENS, seed=1 + window) for window in windows]
    calibration = sq_cpu.calibrate(model, batches, progress=False)
    return sq_cpu.quantize(model, calibration, scheme=scheme, progress=False, **options)


def to_fused(model: nn.Module, scheme: str) -> nn.Module:
    """Return a quantized copy, its head too, that runs as one native call."""
    model = to_int8(model, scheme, head="int8")
    sq_cpu.fuse(model)
    return model


def make_models(name: str, settings: Settings) -> Models:
    """Make all variants; those that start from a copy in fp32 first, while few are in memory."""
    models: Models = {}

    def add(variant: str, make: Callable[[], nn.Module]) -> None:
        start = time.perf_counter()
        models[variant] = make()
        say(f"  made {variant} in {time.perf_counter() - start:.1f} s")

    def add_int8(dtype: str) -> None:
        for scheme in settings.schemes:
            add(f"{scheme} {dtype}", lambda scheme=scheme: to_int8(models[dtype], scheme))
            if settings.fused:
                name = f"{scheme} {dtype} fused"
                add(name, lambda scheme=scheme: to_fused(models[dtype], scheme))

    add(FP32, lambda: load_model(name, settings.layers))
    _check_lengths(models[FP32], settings)
    add_int8(FP32)
    add(BF16, lambda: to_bf16(models[FP32]))
    add_int8(BF16)
    return models


def _check_lengths(model: nn.Module, settings: Settings) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    longest = max(settings.prompt, settings.context + settings.tokens + 1, CALIBRATION_TOKENS)
    if longest > limit:
        raise sq_cpu.SqCpuError(
            f"the model has {limit} positions and {longest} are needed, {CALIBRATION_TOKENS} of "
            "them to calibrate: lower --prompt, --context or --tokens, or take another model"
        )


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the linears' weights: what one step of decoding reads at least."""
    total = 0
    for module in model.modules():
        if isinstance(module, sq_cpu.QuantLinear):
            total += module.in_features * module.out_features
        elif isinstance(module, nn.Linear):
            total += module.weight.nbytes
    return total


class Prefill(Candidate):
    """A prompt, [rows, tokens], of which the last token's logits are computed, as for sampling."""

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        super().__init__(
            lambda _: model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits[:, -1]
        )


class Decode(Candidate):
    """Steps after a prompt, one token a row each; given tokens, so that all variants do the same.

    `following` is [rows, steps + 1]: the first step is untimed and readies a call.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, following: Tensor) -> None:
        super().__init__(lambda _: self._steps())
        self._model, self._following = model, following
        self._prompt = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values

    def rotate(self) -> None:
        """Go back to the prompt's end and take a step: the variant before left other things warm.

        Its weights have left the processor's caches, and its team of threads may be another.
        """
        self._cache = copy.deepcopy(self._prompt)
        self._step(0)

    def _step(self, index: int) -> Tensor:
        ids = self._following[:, index : index + 1]
        output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _steps(self) -> Tensor:
        for index in range(1, self._following.shape[1]):
            logits = self._step(index)
        return logits


def _calls(models: Models, work: Work, rows: int, settings: Settings) -> dict[str, Candidate]:
    some = models[FP32]
    if work == "prefill":
        prompt = random_ids(some, rows, settings.prompt, seed=100)
        return {name: Prefill(model, prompt) for name, model in models.items()}
    prompt = random_ids(some, rows, settings.context, seed=101)
    following = random_ids(some, rows, settings.tokens + 1, seed=102)
    return {name: Decode(model, prompt, following) for name, model in models.items()}


def worst_cosine(logits: Tensor, reference: Tensor) -> float:
    """Return the least cosine of a row [vocabulary] with its reference, both less their means.

    Softmax does not see the mean, which would make the logits of any two models alike. NaN where a
    row has one.
    """

    def centred(values: Tensor) -> Tensor:
        return values.float() - values.float().mean(-1, keepdim=True)

    return float(nn.functional.cosine_similarity(centred(logits), centred(reference), -1).min())


def verify(calls: Mapping[str, Candidate], least: float) -> tuple[dict[str, float], dict[str, str]]:
    """Run every call; return the cosines with fp32, and why variants are refused."""
    cosines: dict[str, float] = {}
    refused: dict[str, str] = {}
    reference: Any = None
    for name in (FP32, *(name for name in calls if name != FP32)):
        calls[name].rotate()
        logits: Any = calls[name].call(0)
        reference = logits if name == FP32 else reference
        cosines[name] = worst_cosine(logits, reference)
        if not bool(logits.isfinite().all()):
            refused[name] = "the logits are not finite"
        elif cosines[name] < least:
            refused[name] = f"the logits' cosine with fp32's is {cosines[name]:.4f}, below {least}"
    return cosines, refused


def _figures(stats: Stats, work: Work, row: Row, weights: int) -> Row:
    steps = row["steps"] if work == "decode" else 1
    tokens = row["rows"] * (steps if work == "decode" else row["prompt"])
    read = weights * steps / stats.median / 1e9 if work == "decode" else None
    return {
        "seconds": asdict(stats),
        "tokens_per_second": {
            "median": tokens / stats.median,
            "p10": tokens / stats.p90,
            "p90": tokens / stats.p10,
        },
        "weight_gb_per_second": read,
    }


def measure_work(models: Models, work: Work, rows: int, settings: Settings, seconds: float) -> Row:
    """Verify the variants and time those that passed, in turns; none where fp32 is refused."""
    row: Row = {"layers": models[FP32].config.get_text_config().num_hidden_layers}
    row |= {"work": work, "rows": rows}
    if work == "prefill":
        row["prompt"] = settings.prompt
    else:
        row |= {"context": settings.context, "steps": settings.tokens}
    calls = _calls(models, work, rows, settings)
    cosines, refused = verify(calls, settings.least_cosine)
    # `interleave` has the first one, int8, in every round.
    timed = {name: calls[name] for name in reversed(calls) if name not in refused}
    stats: dict[str, Stats] = {}
    if FP32 not in refused:
        stats = interleave(timed, warm=False, budget=_TIMED_SHARE * seconds)
    row["variants"] = {
        name: {
            **_figures(stats[name], work, row, weight_bytes(models[name])),
            "cosine": cosines[name],
        }
        for name in models
        if name in stats
    }
    row["ratio"] = {
        name: {peer: stats[peer].median / stats[name].median for peer in FLOATS if peer in stats}
        for name in row["variants"]
        if name not in FLOATS
    }
    return row | {"refused": refused}


def measure(name: str, threads: int, settings: Settings, seconds: float) -> list[Row]:
    """Measure one model with so many threads, in about so many seconds."""
    torch.set_num_threads(threads)
    end = time.perf_counter() + seconds
    models = make_models(name, settings)
    todo: list[tuple[Work, int]] = [("prefill", 1), *(("decode", rows) for rows in settings.rows)]
    found = []
    with torch.inference_mode():
        for done, (work, rows) in enumerate(todo):
            share = max(0.0, end - time.perf_counter()) / (len(todo) - done)
            start = time.perf_counter()
            row = measure_work(models, work, rows, settings, share)
            found.append({"model": name, "threads": threads, **row})
            say(f"  {work} of {rows} in {time.perf_counter() - start:.1f} s")
    return found
