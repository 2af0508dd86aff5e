"""Which options of `sq-cpu quantize` do not go together."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer

__all__ = ["check_auto", "check_recipe", "check_smoothing", "is_given"]

# Options of one scheme alone, which auto may not pick.
_OF_ONE = {
    "static_range": "--range",
    "percentile": "--percentile",
    "outlier_threshold": "--outlier-threshold",
}
_OF_AUTO = {"goal": "--goal", "text": "--text", "text_windows": "--text-windows"}
# Options of which the recipe of another tool says what they would.
_OF_NO_RECIPE = {
    "plan": "--plan",
    "scheme": "--scheme",
    "alpha": "--alpha",
    "rule": "--rule",
    "smooth": "--no-smooth",
    "hadamard": "--hadamard",
    "symmetric": "--symmetric",
    "static_range": "--range",
    "percentile": "--percentile",
    "outlier_threshold": "--outlier-threshold",
    "ignore": "--ignore",
    "head": "--head",
    "stream": "--stream",
}


def is_given(ctx: typer.Context, name: str) -> bool:
    """Say whether an option is the user's, not its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def check_recipe(ctx: typer.Context) -> None:
    """Refuse what does not go with `--recipe`."""
    for name, option in _OF_NO_RECIPE.items():
        if is_given(ctx, name):
            raise typer.BadParameter(
                f"{option} does not go with --recipe, which says itself what is done to which "
                "linear; drop one of them"
            )


def check_auto(ctx: typer.Context, is_auto: bool, plan: Path | None, stream: bool | None) -> None:
    """Refuse what does not go with `--scheme auto`, and what goes with nothing else."""
    for name, option in (_OF_ONE if is_auto else _OF_AUTO).items():
        if is_given(ctx, name):
            raise typer.BadParameter(
                f"{option} is for one scheme alone; drop it, or name the scheme in place of auto"
                if is_auto
                else f"{option} goes with --scheme auto; drop it, or give both"
            )
    if is_auto and plan is not None:
        raise typer.BadParameter("--plan says how to quantize; drop it, or --scheme auto")
    if is_auto and stream:
        raise typer.BadParameter(
            "--scheme auto tries schemes on a copy in memory; drop it, or --stream"
        )


def check_smoothing(
    plan: Path | None,
    alpha: float | None,
    rule: Enum | None,
    hadamard: bool | None,
    smooth: bool,
) -> None:
    """Refuse options that say differently how to smooth."""
    if plan is not None and (alpha is not None or rule is not None or not smooth):
        raise typer.BadParameter(
            "--plan says how to smooth; drop it, or --alpha, --rule and --no-smooth"
        )
    if hadamard and not smooth:
        raise typer.BadParameter("--hadamard goes with smoothing; drop it, or --no-smooth")
    if hadamard is not None and plan is not None:
        raise typer.BadParameter(
            "--plan says what is rotated; drop it, or --hadamard and --no-hadamard"
        )
    if alpha is not None and not smooth:
        raise typer.BadParameter("--alpha has no effect with --no-smooth; drop one of them")
    if rule is not None and not smooth:
        raise typer.BadParameter("--rule has no effect with --no-smooth; drop one of them")
    if rule is not None and rule.value != "smoothquant" and alpha is not None:
        raise typer.BadParameter(
            f"--alpha has no effect with --rule {rule.value}; drop one of them"
        )
