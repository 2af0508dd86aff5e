"""`sq-cpu tune`: a plan for `sq-cpu quantize --plan`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from sq_cpu.cli.autotune import autotune_command
from sq_cpu.cli.common import (
    GOAL,
    Dtype,
    Hadamard,
    Json,
    Model,
    Prefix,
    PrefixName,
    SchemeName,
    TrustRemoteCode,
    Window,
    emit,
    hadamard_choice,
    hold,
)
from sq_cpu.cli.tuning import Calib, DtypeOption, Ignore, Out, Windows, tuning_input
from sq_cpu.scheme import Scheme
from sq_cpu.tuning.learned import learn
from sq_cpu.tuning.tune import OUTLIERS, tune


def tune_command(
    ctx: typer.Context,
    model: Model,
    out: Out,
    scheme: Annotated[
        SchemeName | None,
        typer.Option(
            help="Activation scales: O1 per token, O2 per tensor, O3 static. [default: O3]"
        ),
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(help=f"{GOAL} Then it is autotune, with its other options' defaults."),
    ] = None,
    calib: Calib = None,
    windows: Windows = 16,
    window: Window = 512,
    ignore: Ignore = None,
    prefix: Prefix = PrefixName.auto,
    dtype: DtypeOption = Dtype.fp32,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential", help="Tune each block on what the quantized ones before it give."
        ),
    ] = False,
    outliers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"Massive channels that a linear may keep in float. [default: {OUTLIERS}]",
        ),
    ] = None,
    hadamard: Hadamard = None,
    learn_steps: Annotated[
        int,
        typer.Option(
            "--learn",
            metavar="STEPS",
            min=0,
            help="Then move alphas and clips along gradients of the whole model's loss.",
        ),
    ] = 0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Choose the smoothing of every layer of MODEL and write it to PLAN.json."""
    if goal is not None:
        given = (scheme, outliers, hadamard)
        if sequential or learn_steps or any(each is not None for each in given):
            raise typer.BadParameter(
                "--goal leaves all of the plan to autotune; drop it, or --scheme, --sequential, "
                "--outliers, --hadamard and --learn"
            )
        autotune_command(
            ctx,
            model,
            out,
            goal=goal,
            calib=calib,
            windows=windows,
            window=window,
            ignore=ignore,
            prefix=prefix,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            as_json=as_json,
        )
        return
    if learn_steps and windows < 2:
        raise typer.BadParameter(
            "--learn holds every fourth window out: give two --windows or more"
        )
    hold(ctx, out)
    data = tuning_input(model, calib, windows, window, dtype, ignore, trust_remote_code, prefix)
    start = time.perf_counter()
    loaded, tokenizer, batches = data.load()
    calibration = data.calibration(loaded, tokenizer, batches)
    settings = Scheme.of((scheme or SchemeName.o3).value, ignore=data.ignore)
    plan = tune(
        loaded,
        calibration,
        scheme=settings,
        sequential=sequential,
        outliers=OUTLIERS if outliers is None else outliers,
        hadamard=hadamard_choice(hadamard),
        batches=batches,
    )
    plan.save(out)
    learned = None
    if learn_steps:
        learned = learn(loaded, calibration, plan, batches, steps=learn_steps)
        plan = learned.plan
        plan.save(out)
    seconds = round(time.perf_counter() - start, 1)
    alphas = [group.alpha for group in plan.groups]
    rotated = sum(group.rotation != 0 for group in plan.groups)
    result = {
        "output": str(out),
        "scheme": settings.to_dict(),
        "groups": len(alphas),
        "channels_in_float": sum(len(layer.outliers) for layer in plan.layers),
        "alpha": {"least": min(alphas, default=None), "greatest": max(alphas, default=None)},
        "learned": None
        if learned is None
        else {"divergence_before": learned.before, "divergence_after": learned.after},
        "rotated": rotated,
        "seconds": seconds,
    }
    text = (
        f"{out}: {len(alphas)} groups ({settings.name}), alpha {min(alphas, default=0):.2f} to "
        f"{max(alphas, default=0):.2f}, {rotated} rotated, in {seconds:.0f} s"
    )
    if learned is not None:
        text += f"; divergence {learned.before:.4f}, learned {learned.after:.4f} nats a token"
    emit(result, as_json, text)
