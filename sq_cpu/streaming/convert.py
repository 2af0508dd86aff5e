"""From where a model is to an int8 checkpoint: in memory, or streamed where it does not fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.calibration.calibration import Calibration
from sq_cpu.checkpoint.card import Measured
from sq_cpu.checkpoint.config import QUANT_METHOD
from sq_cpu.checkpoint.folder import Staging, staged
from sq_cpu.checkpoint.kinds import is_for_floats
from sq_cpu.checkpoint.preprocessors import Preprocessor
from sq_cpu.checkpoint.save import check_format, save_staged
from sq_cpu.checkpoint.sources import (
    check_causal,
    is_no_language_model,
    load_any,
    load_tokenizer,
)
from sq_cpu.errors import SqCpuError
from sq_cpu.inference.prefix import make_prefix
from sq_cpu.kernels.runtime import available_memory
from sq_cpu.models.calls import Batch
from sq_cpu.models.linears import linearized, quantizable_linears
from sq_cpu.models.tokenizers import lead_with, leading_ids
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.quantization.head import find_head
from sq_cpu.quantization.quantize import carry_out
from sq_cpu.quantization.recipe import Recipe
from sq_cpu.streaming import streaming
from sq_cpu.streaming.streaming import QuantizedCheckpoint
from sq_cpu.streaming.tensors import has_safetensors

__all__ = ["BatchesOf", "Choose", "Job", "PrefixChoice", "convert", "find_prefix", "linear_bytes"]

# What quantizing a model in memory needs, over its size in float.
_SLACK = 1.3

Say = Callable[[str], object]
Choose = Callable[[nn.Module, Any, Calibration], Recipe]
"""Chooses the recipe for a model, its tokenizer and its calibration; the model stays as it is."""
BatchesOf = Callable[[nn.Module | None, Any], Sequence[Batch]]
PrefixChoice = Literal["auto", "bos", "off"]
"""What texts begin with whose keys and values stay in float: what the tokenizer puts in front, its
BOS, which it then always does, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to make of which model; the other fields are those of `quantize_checkpoint`."""

    source: str
    """A folder, a GGUF file or the name of a hub model."""
    out: Path
    recipe: Recipe
    dtype: torch.dtype | None = torch.float32
    overwrite: bool = False
    """Replace a checkpoint in `out`; discard unfinished work of other settings."""
    trust_remote_code: bool = False
    """Whether code of the model's own may run; then not streamed."""
    prefix: PrefixChoice = "auto"
    format: str = QUANT_METHOD
    """Of `save`; others than ours are not streamed."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Those of the calibration: all of its batches are of the recipe's target."""
        target = self.recipe.target_length
        return () if target is None else (target,)


def convert(
    job: Job,
    batches_of: BatchesOf,
    *,
    stream: bool | None = None,
    choose: Choose | None = None,
    copies: int = 1,
    measured: Callable[[nn.Module], Measured] = lambda _: (),
    say: Say = lambda _: None,
) -> QuantizedCheckpoint:
    """Calibrate, smooth, quantize and save.

    What needs no ranges is calibrated, too: that shows which linears the model calls, and of which
    its own code uses the weight.

    Parameters
    ----------
    batches_of : callable
        Makes the calibration batches, of the float model (None where it is streamed) and its
        tokenizer, or the `Preprocessor` of a model that is no causal language model.
    stream : bool, optional
        One decoder block at a time, see `quantize_checkpoint`. None: to go on with interrupted
        work, or where the float model does not fit in the memory that is available.
    choose : callable, optional
        Chooses the recipe that is carried out, one with the job's `ignore` and `head`. Not streamed
        then.
    copies : int
        Copies of the model that `choose` holds at once.
    measured : callable
        Gives what the model card is to say of the int8 model.
    say : callable
        Told, in a line, what is going on.

    Raises
    ------
    SqCpuError
        What loading, `calibrate`, `quantize` and `save`, or `quantize_checkpoint`, refuse, and
        where `choose` is to choose for a model that does not fit, with its copies.
    """
    check_format(job.format, job.recipe)
    if choose is not None:
        _check_fits(job, stream, copies)
        stream = False
    if stream is None:
        # Blocks are streamed by what is known of transformers' own classes.
        stream = not job.trust_remote_code and _is_unfinished_or_too_large(job, say)
    if stream:
        check_causal(Path(os.path.expanduser(job.source)))
    if stream and job.trust_remote_code:
        raise SqCpuError(
            "a model of its own code cannot be streamed: leave out --stream or --trust-remote-code"
        )
    if stream and job.format != QUANT_METHOD:
        raise SqCpuError(
            f"a model in the format {job.format} is not streamed: leave out --stream, or --format; "
            f"or finish in another folder than {job.out}"
        )
    # Held from the start: another run on it is refused before its work, not after.
    with staged(job.out, replace=job.overwrite, streamed=stream) as staging:
        if stream:
            return _stream(job, staging, batches_of, say)
        return _whole(job, staging, batches_of, choose, measured, say)


def linear_bytes(model: nn.Module, ignore: tuple[str, ...], but: str | None = None) -> int:
    """Return the resident bytes of a model's linears, int8 or float, biases and scales included.

    Float ones that `ignore` has, `but` for one, are left out.
    """
    total = sum(m.nbytes for m in model.modules() if isinstance(m, QuantLinear))
    for module in model.modules():
        if isinstance(module, DecomposedLinear):
            total += module.columns.nbytes + module.outlier_weight.nbytes
    with linearized(model):
        for linear in quantizable_linears(model, ignore, but=but).values():
            total += sum(parameter.nbytes for parameter in linear.parameters())
    return total


def _whole(
    job: Job,
    staging: Staging,
    batches_of: BatchesOf,
    choose: Choose | None,
    measured: Callable[[nn.Module], Measured],
    say: Say,
) -> QuantizedCheckpoint:
    model, tokenizer = load_any(
        job.source, dtype=job.dtype, trust_remote_code=job.trust_remote_code, say=say
    )
    recipe = job.recipe
    ignore = recipe.scheme.ignore
    with linearized(model):
        head = find_head(model, ignore) if recipe.head == "int8" else None
    name = None if head is None or head.in_float else head.name
    float_bytes = linear_bytes(model, ignore, but=name)
    prefix = find_prefix(model, tokenizer, job.prefix, say)
    batches = batches_of(model, tokenizer)
    calibration = calibrate(model, batches, ignore=ignore, prefix=prefix, lengths=job.lengths)
    if choose is not None:
        recipe = choose(model, tokenizer, calibration)
        check_format(job.format, recipe)
    say(f"quantizing with {recipe.scheme.name}")
    carry_out(model, calibration, recipe)
    say(f"saving {job.out}")
    save_staged(staging, model, tokenizer, measured=measured(model), format=job.format)
    made: Any = model
    return QuantizedCheckpoint(
        path=staging.path,
        record=made.sq_cpu_config,
        calibration_tokens=calibration.tokens,
        float_bytes=float_bytes,
        int8_bytes=linear_bytes(model, ignore, but=name),
        streamed=False,
    )


def find_prefix(model: nn.Module, tokenizer: Any, choice: PrefixChoice, say: Say) -> list[int]:
    """Return the ids of the prefix that a model is to have; empty, as `say` is told why, for none.

    Raises `SqCpuError` where BOS is asked for, and cannot be.
    """
    if isinstance(tokenizer, Preprocessor):
        if choice == "bos":
            raise SqCpuError(
                f"a prefix is for causal language models, and this is a {type(model).__name__}: "
                "leave it out"
            )
        return []
    ids = _leading(tokenizer, choice, say)
    if not ids:
        return []
    try:
        make_prefix(model, ids)
    except SqCpuError as error:
        if choice == "bos":
            raise
        say(str(error))
        return []
    return ids


def _leading(tokenizer: Any, choice: PrefixChoice, say: Say) -> list[int]:
    if choice == "off":
        return []
    if choice == "bos":
        lead_with(tokenizer)
    ids = leading_ids(tokenizer)
    if not ids:
        say("no prefix: the tokenizer puts no BOS in front of texts (--prefix bos)")
    return ids


def _stream(job: Job, staging: Staging, batches_of: BatchesOf, say: Say) -> QuantizedCheckpoint:
    folder = Path(os.path.expanduser(job.source))
    streaming.float_bytes(folder, None)  # refuses what is not a folder of safetensors files
    tokenizer = load_tokenizer(folder, f"model folder {folder}")
    prefix = _leading(tokenizer, job.prefix, say)
    batches = batches_of(None, tokenizer)
    say(f"quantizing with {job.recipe.scheme.name}, one block at a time")
    try:
        return streaming.stream_checkpoint(
            folder,
            staging,
            batches,
            job.recipe,
            prefix=prefix,
            can_do_without=job.prefix == "auto",
            lengths=job.lengths,
            dtype=job.dtype,
            tokenizer=tokenizer,
            overwrite=job.overwrite,
            say=say,
        )
    except KeyboardInterrupt:
        if work := streaming.unfinished(job.out):
            say(f"finished blocks are kept in {work}; the same command resumes")
        raise


def _check_fits(job: Job, stream: bool | None, copies: int) -> None:
    """Refuse to choose a recipe for what is streamed: it takes the model, and copies of it."""
    if stream:
        raise SqCpuError("a recipe is not chosen for a streamed model: say which")
    if not job.overwrite and (work := streaming.unfinished(job.out)):
        raise SqCpuError(
            f"{work} holds finished blocks of a streamed model, for which no scheme is chosen: "
            "give their scheme, or discard them with --overwrite"
        )
    folder = Path(os.path.expanduser(job.source))
    if not has_safetensors(folder):
        return
    needed, available = _needed(job, _SLACK + copies), available_memory()
    if needed > available:
        needs = " and a copy to try schemes on need" if copies else ", in memory as a whole, needs"
        raise SqCpuError(
            f"{job.source}{needs} {needed / 1e9:.1f} GB of memory in {job.dtype or 'its dtype'}, "
            f"and {available / 1e9:.1f} GB are available: give a scheme"
        )


def _needed(job: Job, times: float) -> float:
    """Return so many times the bytes of a folder's model in float."""
    return streaming.float_bytes(Path(os.path.expanduser(job.source)), job.dtype) * times


def _is_unfinished_or_too_large(job: Job, say: Say) -> bool:
    folder = Path(os.path.expanduser(job.source))
    if streaming.unfinished(job.out):
        return True
    if not has_safetensors(folder) or is_for_floats(folder):
        return False
    needed, available = _needed(job, _SLACK), available_memory()
    if needed > available:
        memory = (
            f"{job.source} needs {needed / 1e9:.1f} GB of memory in {job.dtype or 'its dtype'}, "
            f"and {available / 1e9:.1f} GB are available"
        )
        if is_no_language_model(job.source):
            raise SqCpuError(f"{memory}; only causal language models are streamed: free some")
        say(f"{memory}: streaming")
    return needed > available
