"""What `--calib` gives: texts for a language model, files of its own kind for any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sq_cpu.checkpoint.sources import is_no_language_model
from sq_cpu.cli.common import calibration_batches, read_all, say
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.closeness import Closeness, closeness, main_outputs
from sq_cpu.files import absolute
from sq_cpu.models.calls import Batch
from sq_cpu.samples.batches import sample

__all__ = ["CALIB", "CalibrationData", "calibration_data"]

CALIB = (
    "What the model reads, repeatable: text files; for others than language models also pairs of "
    "texts (.tsv, .jsonl), sound, images, or folders of these. [default: the shipped text]"
)


@dataclass
class CalibrationData:
    """The files to calibrate on; of a model that is no language model, some are held out."""

    is_other: bool
    """Whether the model is no causal language model."""
    paths: Sequence[Path]
    texts: Sequence[str]
    """Of the paths, for a causal language model."""
    windows: int
    window: int
    _held_out: Sequence[Mapping[str, Tensor]] = ()
    _floats: list[Tensor] = field(default_factory=list)

    def batches(self, model: nn.Module | None, preprocessor: Any) -> Sequence[Batch]:
        """Return what to calibrate on, and say so; None is a language model that is streamed."""
        if not self.is_other:
            found = calibration_batches(preprocessor, self.texts, self.window, self.windows)
            say(f"calibrating on {len(found)} windows of {self.window} tokens")
            return found
        assert model is not None
        samples = sample(model, preprocessor, self.paths, windows=self.windows, window=self.window)
        say(f"calibrating on {samples.shown}")
        self._held_out = samples.held_out
        return samples.calibration

    def remember(self, model: nn.Module) -> None:
        """Run the float model on the samples that are held out."""
        self._floats = main_outputs(model, self._held_out)

    def closeness(self, model: nn.Module) -> Closeness | None:
        """Return how close an int8 model is to the remembered one; None without samples."""
        return (
            closeness(main_outputs(model, self._held_out), self._floats) if self._floats else None
        )


def calibration_data(
    model: str,
    calib: Sequence[Path] | None,
    windows: int,
    window: int,
    *,
    is_streamed: bool = False,
) -> CalibrationData:
    """Read a language model's texts; what others are given is read when the model is loaded.

    The hub is not asked about a model that is to be streamed, which has to be a folder.
    """
    paths = calib or []
    is_other = (not is_streamed or absolute(model).exists()) and is_no_language_model(model)
    if is_other:
        for path in paths:
            if not path.exists():
                raise SqCpuError(f"{path}: no such file or folder; give another with --calib")
    texts = () if is_other else read_all(paths)
    return CalibrationData(is_other, paths, texts, windows, window)
