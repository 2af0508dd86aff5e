"""The shipped texts in windows of tokens, as benchmarks beside other tools cut them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer
from torch import Tensor

import sq_cpu
from sq_cpu import texts

Folder = Annotated[str, typer.Argument(help="Of a causal LM.")]
Windows = Annotated[int, typer.Option(min=1, help="Scored, of the shipped text.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]
CalibrationWindows = Annotated[int, typer.Option(min=1)]


@dataclass(frozen=True)
class Shipped:
    """How many windows of how many tokens."""

    windows: int
    window: int
    calibration_windows: int

    @property
    def options(self) -> str:
        """As a command has them."""
        return (
            f"--windows {self.windows} --window {self.window} "
            f"--calibration-windows {self.calibration_windows}"
        )

    def seen(self, tokenizer: Any) -> list[Tensor]:
        """Return what to calibrate on, ids [1, window] each."""
        return self._cut(tokenizer, texts.calibration(), self.calibration_windows)

    def scored(self, tokenizer: Any) -> list[Tensor]:
        """Return what to score."""
        return self._cut(tokenizer, texts.evaluation(), self.windows)

    def _cut(self, tokenizer: Any, text: list[str], count: int) -> list[Tensor]:
        return sq_cpu.token_windows(tokenizer, text, window=self.window, windows=count)
