"""How a model is to be quantized, as one value that is checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.runtime import has_vnni
from sq_cpu.parsing import check_whole
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import AUTO, Hadamard, SmoothPlan, check_rotation, scheme_of
from sq_cpu.smoothing.plan_checks import check_clips
from sq_cpu.smoothing.rules import DEFAULT_ALPHA, check_rule

__all__ = ["HeadKind", "Recipe"]

HeadKind = Literal["int8", "float"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `quantize`, `quantize_checkpoint` and the command line carry out.

    Raises `SqCpuError` for settings that are out of range or exclude each other.
    """

    scheme: Scheme
    """Resolved for this machine, as `of` does it."""
    plan: SmoothPlan | None = None
    """Smoothing group by group, in the place of `alpha` and `rule`, and what overrides the scheme.
    """
    smooth: bool = True
    """Whether to smooth; a plan says it itself."""
    alpha: float = DEFAULT_ALPHA
    """Migration strength of every group, in [0, 1] (SmoothQuant, arXiv 2211.10438, eq. 4)."""
    rule: str = "smoothquant"
    """Smoothing rule of every group, a key of `rules.RULES`."""
    hadamard: Hadamard = AUTO
    """Which inputs are rotated where every group is smoothed alike, as for `SmoothPlan.uniform`; a
    plan says it itself."""
    head: HeadKind = "float"
    """"int8": the head of a model of transformers with two terms of activations, and the embeddings
    that are tied to it, although the scheme ignores it. "float": as the scheme says."""
    target_length: int | None = None
    """Tokens of the task's texts: the calibration is that of such batches
    (`Calibration.for_length`). None: of all."""

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, Scheme) or self.scheme.reduce_range == "auto":
            raise SqCpuError(f"{self.scheme!r} is not a resolved Scheme; make it with Recipe.of")
        _check_plan(self.plan)
        if self.plan is not None and not self.smooth:
            raise SqCpuError("there is a plan and smooth=False; drop one of them")
        if not isinstance(self.smooth, bool):
            raise SqCpuError(f"smooth is {self.smooth!r}; it is True or False")
        is_number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not is_number or not 0.0 <= self.alpha <= 1.0:
            raise SqCpuError(f"alpha is {self.alpha!r}; the migration strength lies in [0, 1]")
        check_rule(self.rule)
        check_rotation(self.hadamard)
        if self.hadamard not in (AUTO, 0) and not self.is_uniform:
            raise SqCpuError("hadamard goes with smoothing, and a plan says it itself: drop it")
        if self.head not in get_args(HeadKind):
            raise SqCpuError(f"head is {self.head!r}; it is {' or '.join(get_args(HeadKind))}")
        check_clips(self.plan, self.scheme)
        if self.target_length is not None:
            check_whole(1, target_length=self.target_length)

    @classmethod
    def of(
        cls,
        scheme: str | Scheme | None = None,
        plan: SmoothPlan | None = None,
        *,
        smooth: bool = True,
        alpha: float = DEFAULT_ALPHA,
        rule: str = "smoothquant",
        hadamard: Hadamard = AUTO,
        head: HeadKind = "float",
        target_length: int | None = None,
    ) -> Recipe:
        """Return the recipe of these arguments, `reduce_range="auto"` decided for this machine.

        The scheme is the given one, else the plan's, else O1.
        """
        _check_plan(plan)
        resolved = scheme_of(scheme, plan).resolve(has_vnni())
        return cls(
            scheme=resolved,
            plan=plan,
            smooth=smooth,
            alpha=alpha,
            rule=rule,
            hadamard=hadamard,
            head=head,
            target_length=target_length,
        )

    @property
    def is_uniform(self) -> bool:
        """Whether every group is smoothed alike, with `alpha` and `rule`."""
        return self.smooth and self.plan is None

    @property
    def needs_calibration(self) -> bool:
        """Whether smoothing, a static scale or an outlier threshold asks for a calibration."""
        if self.plan is not None:
            return self.plan.needs_calibration(self.scheme)
        return self.smooth or self.scheme.needs_calibration

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; what has no effect is None."""
        return {
            "scheme": self.scheme.to_dict(),
            "plan": None if self.plan is None else self.plan.to_dict(),
            "alpha": self.alpha if self.is_uniform else None,
            "rule": self.rule if self.is_uniform else None,
            "hadamard": self.hadamard if self.is_uniform else None,
            "smooth": self.smooth,
            "head": self.head,
            "target_length": None if self.target_length is None else int(self.target_length),
        }


def _check_plan(plan: object) -> None:
    if plan is not None and not isinstance(plan, SmoothPlan):
        raise SqCpuError(
            f"plan is a {type(plan).__name__}, not a SmoothPlan; read a file with SmoothPlan.load"
        )
