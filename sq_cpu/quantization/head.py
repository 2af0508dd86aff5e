"""The head of a model in int8, and the embeddings that are tied to it: found, and planned.

Its activations, not its weights, are what int8 would spoil: every logit is a sum over the same
few outlier channels. So they get two int8 terms, of which reading the weight hides the second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from sq_cpu.models.checks import additions
from sq_cpu.models.groups import SmoothingGroup
from sq_cpu.models.linears import head_of, is_ignored
from sq_cpu.nn.embedding import is_lookup
from sq_cpu.scheme import Activations
from sq_cpu.smoothing.plan import GroupPlan, LayerPlan, SmoothPlan

__all__ = ["HEAD_ACTIVATIONS", "HEAD_ALPHA", "Head", "find_head", "plan_head", "plan_head_group"]

HEAD_ACTIVATIONS: Activations = "per_token_x2"
HEAD_ALPHA = 0.15
"""Migration strength. From 0 to 0.3 the logits are nearly the same: the two terms hold outliers,
and s serves the weights."""


@dataclass(frozen=True)
class Head:
    """The linear that makes the logits of a linearized model."""

    name: str
    """Its full name."""
    embeddings: tuple[str, ...] = ()
    """Full names of the embeddings with the same weight, which then read the int8 one."""
    in_float: str = ""
    """Why it cannot be int8; "" where it can."""


def find_head(model: nn.Module, ignore: tuple[str, ...]) -> Head | None:
    """Return the head of a linearized model, on the meta device or in memory; None: it has none.

    An entry of `ignore` other than "lm_head" that matches it leaves it in float.
    """
    head = head_of(model)
    names = {module: name for name, module in model.named_modules()}
    if head is None or head not in names:
        return None
    name = names[head]
    if type(head) is not nn.Linear:
        return Head(name, in_float=f"a {type(head).__name__}, which may compute something else")
    if is_ignored(model, name, tuple(entry for entry in ignore if entry != "lm_head")):
        return Head(name, in_float="ignored")
    others = [
        module
        for module in names
        if module is not head and any(p is head.weight for p in module._parameters.values())
    ]
    for module in others:
        tied = f"its weight is also that of {names[module]}, "
        if added := additions(module):
            return Head(name, in_float=f"{tied}which {added}")
        if not is_lookup(module):
            kind = type(module).__name__
            return Head(name, in_float=f"{tied}a {kind} that does more than look up")
    return Head(name, tuple(names[module] for module in others))


def plan_head(plan: SmoothPlan | None, head: str) -> SmoothPlan:
    """Return the plan with two terms of activations for the head, unless it has an entry for it."""
    plan = plan or SmoothPlan(())
    if any(layer.name == head for layer in plan.layers):
        return plan
    return replace(plan, layers=(*plan.layers, LayerPlan(name=head, activations=HEAD_ACTIVATIONS)))


def plan_head_group(plan: SmoothPlan, head: str, groups: Iterable[SmoothingGroup]) -> SmoothPlan:
    """Return the plan with the head smoothed at run time, unless it has its group already."""
    group = next(group for group in groups if head in group.consumers)
    if any(planned.name == group.name for planned in plan.groups):
        return plan
    own = GroupPlan(name=group.name, alpha=HEAD_ALPHA, fold=False, note=group.reason)
    return replace(plan, groups=(*plan.groups, own))
