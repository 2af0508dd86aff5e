"""Batches to calibrate a model on, and others that tell what int8 costs it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from sq_cpu import texts
from sq_cpu.checkpoint.preprocessors import Preprocessor
from sq_cpu.errors import SqCpuError
from sq_cpu.progress import track
from sq_cpu.samples.kinds import Row, kind_of
from sq_cpu.samples.subject import Subject

__all__ = ["Samples", "sample"]

T = TypeVar("T")
_HELD_OUT = 8  # one batch beside so many


@dataclass(frozen=True)
class Samples:
    """What `sample` made, as keyword arguments of the model."""

    calibration: list[dict[str, Tensor]]
    held_out: list[dict[str, Tensor]]
    """Of other rows; empty where there is only one."""
    shown: str
    """What they are, in words."""


def sample(
    model: nn.Module,
    preprocessor: Preprocessor,
    paths: Sequence[Path],
    *,
    windows: int,
    window: int,
    shipped: Sequence[str] = (),
    hold_out: bool = True,
    progress: bool | None = None,
) -> Samples:
    """Make batches of a model's own kind of files, spread evenly over all of them.

    Parameters
    ----------
    model : of transformers, in float, no causal language model
    preprocessor : what `load_any` returned with it
    paths : of texts (windows of them), pairs of texts (.tsv, .jsonl), recordings, images, or
        folders of the last two; empty: the shipped text, for a model that reads text
    windows : batches to calibrate on: a window of text or a recording each, or 8 pairs or images;
        fewer, where the files do not hold so many
    window : tokens of a text, at most; fewer, where the model reads no more
    shipped : documents in the place of the shipped text for calibration
    hold_out : whether one batch beside each 8 is made, and kept apart

    Raises
    ------
    SqCpuError
        For a file that cannot be read, which is named, a model that takes something else, and an
        optional package that is missing.
    """
    subject = Subject(model, preprocessor, shipped or texts.calibration())
    kind = kind_of(subject, paths)
    longest = subject.longest(window) if preprocessor.tokenizer is not None else window
    lone = preprocessor.tokenizer is not None and subject.pad is None
    together = 1 if lone else kind.together

    def parts_of(subject: Subject, count: int) -> list[list[Row]]:
        rows = kind.rows(subject, paths, longest)
        if not rows:
            raise SqCpuError(f"{paths[0]} holds no {kind.name}")
        chosen = _spread(rows, count * together)
        return _parts(chosen, min(count, len(chosen)))

    held = -(-windows // _HELD_OUT) if hold_out else 0
    if paths:
        parts = parts_of(subject, windows + held)
        if hold_out and len(parts) < windows + held:
            held = min(len(parts) - 1, -(-len(parts) // _HELD_OUT))
        apart = _spread(range(len(parts)), held)
        last = [parts[k] for k in apart]
        parts = [part for k, part in enumerate(parts) if k not in apart]
    else:
        parts = parts_of(subject, windows)
        last = parts_of(replace(subject, shipped=texts.selection()), held) if held else []
    made = [
        kind.batch(subject, part, longest)
        for part in track([*parts, *last], f"reading {kind.name}", progress)
    ]
    of = f" of {longest} tokens" if kind.are_cut else ""
    shown = f"{sum(map(len, parts))} {kind.name}{of}"
    return Samples(made[: len(parts)], made[len(parts) :], shown)


def _spread(values: Sequence[T], count: int) -> list[T]:
    """Return so many of the values, or all, evenly spread."""
    count = min(count, len(values))
    return [values[k * len(values) // count] for k in range(count)]


def _parts(values: list[T], count: int) -> list[list[T]]:
    """Cut values into so many parts whose sizes differ by one at most."""
    ends = [k * len(values) // count for k in range(count + 1)]
    return [values[a:b] for a, b in itertools.pairwise(ends)]
