"""By how long its sequences are, which part of a calibration a batch belongs to.

What a channel reaches depends on where in a text it is, and so on how long the texts are (SLAC:
calibrate at the length of the task).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.models.calls import Example
from sq_cpu.parsing import check_whole

__all__ = [
    "check_takes_tokens",
    "checked_bucket",
    "checked_lengths",
    "no_batch",
    "of_length",
    "target_bucket",
]


def checked_lengths(lengths: Iterable[int]) -> tuple[int, ...]:
    """Return lengths in tokens; `SqCpuError` unless they are whole numbers from 1 on, ascending."""
    if isinstance(lengths, str | bytes | Mapping) or not isinstance(lengths, Iterable):
        raise SqCpuError("lengths is no list of numbers of tokens: give some as (128, 512, 2048)")
    found = []
    for each in lengths:
        check_whole(1, length=each)
        found.append(int(each))
    if found != sorted(set(found)):
        raise SqCpuError("lengths do not ascend: give them as (128, 512, 2048)")
    return tuple(found)


def check_takes_tokens(model: nn.Module) -> None:
    """Raise `SqCpuError` for a model of transformers that takes frames or images first."""
    name = getattr(model, "main_input_name", "input_ids")
    if name not in ("input_ids", "inputs_embeds"):
        raise SqCpuError(
            f"lengths are of token ids, and the {type(model).__name__} takes {name}: calibrate "
            "without"
        )


def of_length(batches: list[Example], lengths: Sequence[int], target: int | None) -> list[Example]:
    """Return the batches that `Calibration.for_length` has when all are calibrated by length.

    These are all where there is no target.
    """
    buckets = [checked_bucket(*batch, lengths) for batch in batches] if lengths else []
    if target is None:
        return batches
    bucket = target_bucket(target, lengths)
    found = [batch for batch, each in zip(batches, buckets, strict=True) if each == bucket]
    if not found:
        raise SqCpuError(no_batch(target, bucket, lengths))
    return found


def checked_bucket(args: Sequence[Any], kwargs: Mapping[str, Any], lengths: Sequence[int]) -> int:
    """Return the length that holds a batch; `SqCpuError` where none does."""
    length = _length(args, kwargs)
    bucket = _bucket(length, lengths)
    if bucket is None:
        raise SqCpuError(
            f"a calibration batch has {length} tokens, more than the lengths {_listed(lengths)}: "
            "give a greater one, or shorter batches"
        )
    return bucket


def target_bucket(target: int, lengths: Sequence[int]) -> int:
    """Return the length that holds a task's; `SqCpuError` where there is none."""
    check_whole(1, target_length=target)
    if not lengths:
        raise SqCpuError(
            f"there are no ranges by length for target_length={target}: calibrate with "
            f"lengths=({target},), on batches of that many tokens"
        )
    bucket = _bucket(target, lengths)
    if bucket is None:
        raise SqCpuError(
            f"target_length is {target}, more than the calibration's lengths {_listed(lengths)}: "
            "calibrate with a greater one"
        )
    return bucket


def no_batch(target: int, bucket: int, lengths: Sequence[int]) -> str:
    """Say that no batch is of the length that a task's asks for."""
    least = max((each for each in lengths if each < bucket), default=0) + 1
    return (
        f"no calibration batch has {least} to {bucket} tokens, as target_length={target} needs: "
        "calibrate on some that have"
    )


def _listed(lengths: Sequence[int]) -> str:
    return ", ".join(map(str, lengths))


def _length(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the tokens of a batch's longest sequence, without padding by its `attention_mask`."""
    found = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
    if not isinstance(found, Tensor) or found.dim() != 2 + found.is_floating_point():
        raise SqCpuError(
            "lengths are of token ids [sequences, tokens], which a batch lacks: calibrate without"
        )
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == found.shape[:2]:
        return int((mask != 0).sum(dim=1).max())
    return found.shape[1]


def _bucket(length: int, lengths: Sequence[int]) -> int | None:
    """Return the least of some lengths that holds a sequence; None: it is longer."""
    return next((each for each in lengths if length <= each), None)
