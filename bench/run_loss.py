"""What int8 costs a real language model, beside itself in fp32 on the same ids.

python bench/run_loss.py FOLDER --variants O3-plain,O3,O3+prefix,O3-tuned,O1 --windows 20

A variant is a scheme, "-plain" (no rotated inputs, no own scales), "-rotated" (every down
projection) or "-tuned" (`sq_cpu.tune`, with gradients), and "+prefix": windows begin with the
tokenizer's BOS, whose keys and values stay in float. Without that, windows are as the tokenizer
makes them, and a BOS among them is quantized like any other token. All models are held at once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer
from divergence import Divergence
from model_files import recipe_of
from results import Out, ResultFile, Row
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import sq_cpu
from sq_cpu import Calibration, texts
from sq_cpu.calibration.calibrate import TUNING_ROWS
from sq_cpu.progress import track
from sq_cpu.quantization.quantize import carry_out
from sq_cpu.quantization.recipe import Recipe

PREFIX, TUNED = "+prefix", "-tuned"


@dataclass
class Variant:
    """A quantized model and what the windows said of it."""

    name: str
    model: Any
    divergence: Divergence = field(default_factory=Divergence)


@dataclass
class Source:
    """The float model and what it is calibrated on, once for windows with BOS, once without."""

    folder: str
    window: int
    windows: int
    calibration_windows: int
    alpha: float
    gradients: bool
    text: str

    def __post_init__(self) -> None:
        load = AutoModelForCausalLM.from_pretrained
        self.model: Any = load(self.folder, dtype=torch.float32).eval().requires_grad_(False)
        self.tokenizers = {
            lead: AutoTokenizer.from_pretrained(self.folder) for lead in (False, True)
        }
        if not sq_cpu.leading_ids(self.tokenizers[True]):
            sq_cpu.lead_with(self.tokenizers[True])
        self._calibrations: dict[bool, Calibration] = {}

    def evaluated(self, lead: bool) -> list[torch.Tensor]:
        """Return the windows that are scored."""
        return self._ids(self.text, lead, self.windows)

    def calibration(self, lead: bool) -> Calibration:
        """Return the calibration, which is made once."""
        if lead not in self._calibrations:
            self._calibrations[lead] = sq_cpu.calibrate(
                self.model,
                self._ids(texts.calibration(), lead, self.calibration_windows),
                prefix=sq_cpu.leading_ids(self.tokenizers[True]) if lead else (),
                gradient_rows=TUNING_ROWS if self.gradients else 0,
            )
        return self._calibrations[lead]

    def _ids(self, text: str, lead: bool, windows: int) -> list[torch.Tensor]:
        tokenizer = self.tokenizers[lead]
        return sq_cpu.token_windows(tokenizer, text, window=self.window, windows=windows)

    def variant(self, name: str) -> Variant:
        """Quantize a copy as the name says."""
        how = name.removesuffix(PREFIX)
        calibration = self.calibration(name != how)
        recipe = recipe_of(how.removesuffix(TUNED), alpha=self.alpha)
        if how.endswith(TUNED):
            options = {"scheme": recipe.scheme, "hadamard": recipe.hadamard}
            recipe = Recipe.of(plan=sq_cpu.tune(self.model, calibration, **options))
        model = carry_out(copy.deepcopy(self.model), calibration, recipe)
        return Variant(name, model)


def main(
    folder: Annotated[Path, typer.Argument(help="Of a causal LM.")],
    variants: Annotated[str, typer.Option(help="What to measure.")] = "O3-plain,O3,O3+prefix,O1",
    windows: Annotated[int, typer.Option(min=1, help="Scored: these, or what the text has.")] = 20,
    text: Annotated[Path | None, typer.Option(help="In place of the shipped text.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    calibration_windows: Annotated[int, typer.Option(min=1)] = 16,
    alpha: Annotated[float, typer.Option(help="Of what is not tuned.")] = 0.8,
    fuse: Annotated[bool, typer.Option(help="Score what `fuse` makes of them.")] = False,
    out: Out = None,
) -> None:
    """Print perplexity above fp32's, with its standard error, and KL to fp32."""
    logging.disable_progress_bar()
    print(machine.headline())
    try:
        names = variants.split(",")
        for name in names:
            recipe_of(name.removesuffix(PREFIX).removesuffix(TUNED))
        gradients = any(TUNED in name for name in names)
        scored = texts.evaluation() if text is None else text.read_text(encoding="utf-8")
        sizes = (window, windows, calibration_windows)
        source = Source(str(folder), *sizes, alpha, gradients, scored)
        # Without the folder and files, which are this machine's own.
        command = f"python bench/run_loss.py FOLDER --variants {variants} --windows {windows}"
        command += f" --window {window} --calibration-windows {calibration_windows}"
        command += f" --alpha {alpha:g}{' --fuse' * fuse}{' --text FILE' * (text is not None)}"
        results = ResultFile("loss", out, resume=False, sections={"command": command})
        for lead in (False, True):
            made = [source.variant(name) for name in names if name.endswith(PREFIX) == lead]
            for variant in made if fuse else []:
                sq_cpu.fuse(variant.model)
            if made:
                score(source, made, lead)
            for variant in made:
                row = {"variant": variant.name} | variant.divergence.summary()
                row["misfits"] = misfits(variant.model)
                results.add(row)
                show(row)
    except sq_cpu.SqCpuError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


@torch.no_grad()
def score(source: Source, variants: list[Variant], lead: bool) -> None:
    """Compare every variant with the float model, a window after the other."""
    for ids in track(source.evaluated(lead), f"windows{' with BOS' * lead}"):
        reference = source.model(ids).logits[0]
        for variant in variants:
            variant.divergence.add(reference, variant.model(ids).logits[0], ids[0])


def misfits(model: Any) -> float | None:
    """Return the share of static linears' rows that do not fit the scale; None without any.

    They have their own scale, but in a plain scheme.
    """
    counts = sq_cpu.row_counts(model).values()
    rows = sum(each.rows for each in counts)
    return sum(each.clipped + each.underflowed for each in counts) / rows if rows else None


def show(row: Row) -> None:
    print(
        f"{row['variant']:20} {row['perplexity']:.3f} over {row['reference_perplexity']:.3f}: "
        f"{row['percent']:+.2f} % +- {row['percent_error']:.2f}, KL {row['kl_mean']:.4f}, "
        f"same first choice {row['same_top_1']:.1%}, {row['windows']} windows",
        flush=True,
    )


if __name__ == "__main__":
    typer.run(main)
