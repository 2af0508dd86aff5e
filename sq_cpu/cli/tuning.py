"""What `sq-cpu tune` and `sq-cpu autotune` share: options, the model, its calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn

from sq_cpu.calibration.calibrate import TUNING_ROWS, calibrate
from sq_cpu.calibration.calibration import Calibration
from sq_cpu.cli.common import (
    Dtype,
    PrefixName,
    calibration_batches,
    check_not_quantized,
    load_model,
    read_all,
    say,
)
from sq_cpu.models.tokenizers import lead_with
from sq_cpu.streaming.convert import find_prefix

Out = Annotated[Path, typer.Option("-o", "--out", metavar="PLAN.json", help="File to write.")]
Calib = Annotated[
    list[Path] | None,
    typer.Option(help="Calibration text, repeatable. [default: the shipped text]"),
]
Windows = Annotated[int, typer.Option(min=1, help="Calibration windows in all.")]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        help="Linear, or module with all below it, to leave in float, repeatable. "
        "[default: lm_head]"
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="What is not int8 is kept in this.")]


@dataclass(frozen=True, kw_only=True)
class TuningInput:
    """The model, and the text that it is calibrated on."""

    model: str
    own: Sequence[str]
    """The user's texts; empty: the shipped text."""
    windows: int
    window: int
    dtype: Dtype
    ignore: tuple[str, ...]
    trust_remote_code: bool
    prefix: PrefixName

    def load(self) -> tuple[nn.Module, Any, list[Tensor]]:
        """Return the model, its tokenizer and the windows to calibrate on."""
        loaded, tokenizer = load_model(
            self.model, self.dtype, trust_remote_code=self.trust_remote_code
        )
        if self.prefix is PrefixName.bos:
            lead_with(tokenizer)
        batches = calibration_batches(tokenizer, self.own, self.window, self.windows)
        return loaded, tokenizer, batches

    def calibration(self, loaded: nn.Module, tokenizer: Any, batches: list[Tensor]) -> Calibration:
        """Calibrate the model, as `tune` and `autotune` need it."""
        say(f"calibrating on {len(batches)} windows of {self.window} tokens")
        prefix = find_prefix(loaded, tokenizer, self.prefix.value, say)
        return calibrate(
            loaded, batches, ignore=self.ignore, gradient_rows=TUNING_ROWS, prefix=prefix
        )


def tuning_input(
    model: str,
    calib: Sequence[Path] | None,
    windows: int,
    window: int,
    dtype: Dtype,
    ignore: Sequence[str] | None,
    trust_remote_code: bool,
    prefix: PrefixName,
) -> TuningInput:
    """Read the user's texts, and refuse a model that is quantized already."""
    check_not_quantized(model)
    return TuningInput(
        model=model,
        own=read_all(calib or []),
        windows=windows,
        window=window,
        dtype=dtype,
        ignore=tuple(ignore or ("lm_head",)),
        trust_remote_code=trust_remote_code,
        prefix=prefix,
    )
