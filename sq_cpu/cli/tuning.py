"""What `sq-cpu tune` and `sq-cpu autotune` share: options, the model, its calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from sq_cpu.calibration.calibrate import TUNING_ROWS, calibrate
from sq_cpu.calibration.calibration import Calibration
from sq_cpu.checkpoint.sources import load_any
from sq_cpu.cli.calibration import CALIB, CalibrationData, calibration_data
from sq_cpu.cli.common import (
    TORCH_DTYPES,
    Dtype,
    PrefixName,
    check_not_quantized,
    quiet,
    say,
)
from sq_cpu.errors import SqCpuError
from sq_cpu.models.calls import Batch
from sq_cpu.models.tokenizers import lead_with
from sq_cpu.streaming.convert import find_prefix

Out = Annotated[Path, typer.Option("-o", "--out", metavar="PLAN.json", help="File to write.")]
Calib = Annotated[
    list[Path] | None,
    typer.Option(help=CALIB),
]
Windows = Annotated[
    int,
    typer.Option(
        min=1,
        help="Calibration windows in all; of other samples, batches: a recording, or up to 8 "
        "pairs or images each.",
    ),
]
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
    """The model, and what it is calibrated on."""

    model: str
    data: CalibrationData
    dtype: Dtype
    ignore: tuple[str, ...]
    trust_remote_code: bool
    prefix: PrefixName

    def check_language_model(self, what: str) -> None:
        """Refuse another model, for which no perplexity and no task is scored."""
        if self.data.is_other:
            raise SqCpuError(
                f"{what} holds a goal of perplexity or tasks, and {self.model} is no causal "
                "language model: use sq-cpu tune without --goal"
            )

    def load(self) -> tuple[nn.Module, Any, Sequence[Batch]]:
        """Return the model, what prepares its inputs, and the batches to calibrate on."""
        quiet()
        loaded, preprocessor = load_any(
            self.model,
            dtype=TORCH_DTYPES[self.dtype],
            trust_remote_code=self.trust_remote_code,
            say=say,
        )
        if self.prefix is PrefixName.bos and not self.data.is_other:
            lead_with(preprocessor)
        return loaded, preprocessor, self.data.batches(loaded, preprocessor)

    def calibration(
        self, loaded: nn.Module, preprocessor: Any, batches: Sequence[Batch]
    ) -> Calibration:
        """Calibrate the model, as `tune` and `autotune` need it."""
        prefix = find_prefix(loaded, preprocessor, self.prefix.value, say)
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
    """Read a language model's texts, and refuse a model that is quantized already."""
    check_not_quantized(model)
    return TuningInput(
        model=model,
        data=calibration_data(model, calib, windows, window),
        dtype=dtype,
        ignore=tuple(ignore or ("lm_head",)),
        trust_remote_code=trust_remote_code,
        prefix=prefix,
    )
