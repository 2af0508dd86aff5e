"""Quantizing a checkpoint that memory cannot hold: one decoder block at a time.

Only one block's weights are in memory; the activations of the calibration batches are carried from
block to block. Memory holds at most three times the largest block as bf16, and these activations.
What is outside of the blocks (embeddings, the last norm, the head) is copied to its file piece by
piece and mapped from there; only a head that is to be quantized is in memory as a whole, at last.

The result is, bit for bit, what `calibrate`, `quantize` and `save` make of the whole model. Work in
progress is kept in a hidden folder beside the output (`work_folder`), from which a later call goes
on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers

from sq_cpu.calibration.lengths import checked_lengths, of_length
from sq_cpu.checkpoint import sources
from sq_cpu.checkpoint.config import check_dtype
from sq_cpu.checkpoint.folder import STATE, Staging, staged, work_folder, writing
from sq_cpu.checkpoint.likeness import is_rebuilt
from sq_cpu.checkpoint.load import read_generation_config
from sq_cpu.checkpoint.skeleton import skeleton
from sq_cpu.errors import SqCpuError
from sq_cpu.files import as_path
from sq_cpu.inference.requests import integers
from sq_cpu.models.block_chain import BlockChain
from sq_cpu.models.calls import Batch, Example, evaluating, model_inputs
from sq_cpu.models.hf_private import compute_buffers
from sq_cpu.quantization.recipe import HeadKind, Recipe
from sq_cpu.quantization.record import QuantizationRecord
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import AUTO, Hadamard, SmoothPlan
from sq_cpu.smoothing.rules import DEFAULT_ALPHA
from sq_cpu.streaming.loader import Loader
from sq_cpu.streaming.stream import Stream
from sq_cpu.streaming.tensors import WHOLE, folder_dtype, folder_tensors
from sq_cpu.streaming.work_folder import (
    State,
    batches_digest,
    source_digest,
)

__all__ = [
    "QuantizedCheckpoint",
    "float_bytes",
    "quantize_checkpoint",
    "stream_checkpoint",
    "unfinished",
]


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """What was made of a model, and how."""

    path: Path
    record: QuantizationRecord
    calibration_tokens: int
    """Rows that the busiest linear saw, padding not counted; 0 without a calibration."""
    float_bytes: int
    int8_bytes: int
    """Resident bytes of all linears that are not ignored, before and after."""
    streamed: bool = True
    """One block at a time; or in memory, as a whole."""


def quantize_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    batches: Iterable[Batch] | None = None,
    *,
    scheme: str | Scheme | None = None,
    plan: SmoothPlan | None = None,
    alpha: float = DEFAULT_ALPHA,
    rule: str = "smoothquant",
    hadamard: Hadamard = AUTO,
    smooth: bool = True,
    head: HeadKind = "float",
    prefix: Sequence[int] = (),
    lengths: Sequence[int] = (),
    target_length: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: bool | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> QuantizedCheckpoint:
    """Quantize a causal language model from folder to folder, one decoder block at a time.

    The checkpoint is, bit for bit, the one of `calibrate`, `quantize` and `save` on the same
    batches. A call that was interrupted, in whatever way, is resumed by the same call: finished
    blocks are kept in the hidden folder `.OUT.partial` beside `out`, whose name `out` gives.

    Parameters
    ----------
    source : path-like
        A folder with config.json and safetensors files, of a model with one stack of blocks.
    out : path-like
        Folder to write, as for `save`.
    batches : iterable, optional
        As for `calibrate`. Needed to smooth, for static linears and an outlier threshold; given, it
        also finds what no batch reaches, and the weights that the model's own code uses.
    scheme, plan, smooth, head
        As for `quantize`.
    alpha, rule
        Migration strength and rule of every group, where there is no plan.
    hadamard
        As for `quantize`, where there is no plan.
    prefix
        As for `calibrate`. That the model can have one is proven block by block, so what a later
        block refuses is known late.
    lengths : sequence of int
        As for `calibrate`.
    target_length : int, optional
        As for `quantize`; the batches of other lengths are not run.
    dtype : torch.dtype, optional
        fp32, bf16 or fp16: what the float model runs in, and what is not int8 is kept in. None:
        as stored.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Saved into the same folder.
    overwrite : bool
        Discard unfinished work of other settings.
    progress : bool, optional
        Show a bar over the blocks; None: when stderr is a terminal.
    say : callable
        Told, in a line, where an interrupted call is resumed.

    Raises
    ------
    SqCpuError
        What `calibrate`, `quantize` and `save` refuse; no folder of safetensors files, or a
        missing or damaged one; a model whose blocks are not one stack, or that does not hand the
        hidden states alone from block to block; unfinished work of other settings.
    """
    recipe = Recipe.of(
        scheme,
        plan,
        smooth=smooth,
        alpha=alpha,
        rule=rule,
        hadamard=hadamard,
        head=head,
        target_length=target_length,
    )
    with staged(out, streamed=True) as staging:
        return stream_checkpoint(
            source,
            staging,
            batches,
            recipe,
            prefix=prefix,
            lengths=lengths,
            dtype=dtype,
            tokenizer=tokenizer,
            overwrite=overwrite,
            progress=progress,
            say=say,
        )


def stream_checkpoint(
    source: str | os.PathLike[str],
    staging: Staging,
    batches: Iterable[Batch] | None,
    recipe: Recipe,
    *,
    prefix: Sequence[int] = (),
    can_do_without: bool = False,
    lengths: Sequence[int] = (),
    dtype: torch.dtype | None,
    tokenizer: Any,
    overwrite: bool,
    progress: bool | None = None,
    say: Callable[[str], object],
) -> QuantizedCheckpoint:
    """Do what `quantize_checkpoint` does, as `recipe` says, in a folder that is held.

    With `can_do_without`, a model whose first block can have no prefix gets none, as `say` is told.
    """
    check_dtype(dtype)
    ids = tuple(integers(prefix, "prefix"))
    if ids and batches is None:
        raise SqCpuError("a prefix needs batches to calibrate on, of texts that begin with it")
    lengths = checked_lengths(lengths)
    if recipe.needs_calibration and batches is None:
        raise SqCpuError(
            "smoothing, static scales and an outlier threshold need batches to calibrate on"
        )
    folder = as_path(source)
    weights = folder_tensors(folder)
    sources.check_causal(folder)
    sources.check_float(folder)
    dtype = dtype or folder_dtype(folder, weights)

    model = _skeleton(folder, dtype, len(weights))
    chain = BlockChain(model, WHOLE)
    inputs: list[Example] = []
    if batches is not None:
        for given in model_inputs(model, batches, "calibration", "reading batches", False):
            inputs.append(given)
        inputs = of_length(inputs, lengths, recipe.target_length)
    elif recipe.target_length is not None:
        raise SqCpuError("target_length chooses of batches: give some, or leave it out")
    settings = {
        **{package: version(package) for package in ("sq_cpu", "torch", "transformers")},
        "source": source_digest(folder, weights),
        "batches": batches_digest(inputs),
        **recipe.to_dict(),
        "prefix": ids,
        "dtype": str(dtype).removeprefix("torch."),
    }
    with writing(staging.target), evaluating(model):
        state = State.open(staging, settings, overwrite)
        if state.parts:
            say(f"resuming: {state.blocks} of {len(chain.names)} blocks are finished")
        try:
            loader = Loader(model, weights, folder)
            stream = Stream(loader, chain, staging, state, recipe)
            if not state.blocks:
                state.prefix = ids
            record = stream.run(inputs, tokenizer, progress, say if can_do_without else None)
        except BaseException:
            if not state.blocks:  # there is nothing to go on from
                (staging.work / STATE).unlink(missing_ok=True)
            raise
    staging.commit()
    return QuantizedCheckpoint(
        path=staging.path,
        record=record,
        calibration_tokens=state.tokens,
        float_bytes=stream.outer_float_bytes + sum(part.float_bytes for part in state.parts),
        int8_bytes=stream.outer_float_bytes + sum(part.int8_bytes for part in state.parts),
    )


def unfinished(out: str | os.PathLike[str]) -> Path | None:
    """Return the folder from which `quantize_checkpoint` would resume writing `out`, if any."""
    with writing(Path(out)):
        work = work_folder(Path(os.path.realpath(out)))
        return work if (work / STATE).exists() else None


def float_bytes(source: str | os.PathLike[str], dtype: torch.dtype | None) -> int:
    """Return the bytes of a folder's tensors in `dtype`; None: as stored."""
    tensors = folder_tensors(Path(source)).values()
    return sum(prod(tensor.shape) * (dtype or tensor.dtype).itemsize for tensor in tensors)


def _skeleton(folder: Path, dtype: torch.dtype, tensors: int) -> Any:
    model = skeleton(folder, tensors, auto=transformers.AutoModelForCausalLM, dtype=dtype)
    if not is_rebuilt(model):
        raise SqCpuError(f"{type(model).__name__} is not a class of transformers; {WHOLE}")
    compute_buffers(model)
    read_generation_config(model, folder)
    # In evaluation mode from the start: `evaluating` would keep hold of modules in training.
    return model.eval().requires_grad_(False)
