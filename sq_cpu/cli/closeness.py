"""`sq-cpu eval --source`: a model that is no language model, beside its float model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sq_cpu import texts
from sq_cpu.checkpoint.sources import is_no_language_model, load_any
from sq_cpu.cli.common import TORCH_DTYPES, Dtype, emit, quiet, say
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.closeness import closeness, main_outputs
from sq_cpu.samples.batches import sample

__all__ = ["emit_closeness"]


def emit_closeness(
    model: str,
    source: str,
    paths: Sequence[Path],
    windows: int,
    window: int,
    dtype: Dtype | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Run both models on the same samples and print how far their outputs are from each other."""
    for each in (source, model):
        if not is_no_language_model(each):
            raise SqCpuError(
                f"{each} is a causal language model, whose perplexity eval prints: leave out "
                "--source"
            )
    quiet()
    loaded, preprocessor = load_any(source, trust_remote_code=trust_remote_code, say=say)
    made = sample(
        loaded,
        preprocessor,
        paths,
        windows=windows,
        window=window,
        shipped=texts.evaluation(),
        hold_out=False,
    )
    floats = main_outputs(loaded, made.calibration)
    kind = type(loaded).__name__
    del loaded
    int8, _ = load_any(
        model, dtype=TORCH_DTYPES[dtype], trust_remote_code=trust_remote_code, say=say
    )
    if type(int8).__name__ != kind:
        raise SqCpuError(
            f"{model} holds a {type(int8).__name__} and {source} a {kind}: give the model that the "
            "int8 one was made of"
        )
    found = closeness(main_outputs(int8, made.calibration), floats)
    emit(
        {"model": model, "source": source, **found.to_dict(), "samples": made.shown},
        as_json,
        f"outputs beside those of {source}: relative error {found.relative_error:.4f}, cosine "
        f"{found.cosine:.5f} ({made.shown})",
    )
