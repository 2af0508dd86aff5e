"""Folding a smoothing scale into the weights, with the proof that the function is preserved.

Producer: output channels / s (a norm's weight and bias, a linear's rows and bias). Consumers: input
columns * s. Right if, and only if, the group holds every consumer of the producer's output; the
family's row says so, and `apply_scales` checks it on the model at hand before it changes anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sq_cpu.calibrate import evaluating
from sq_cpu.errors import SqCpuError
from sq_cpu.families import SmoothingGroup, smoothing_groups

__all__ = ["apply_scales"]

# How much further than a random perturbation of the touched weights by one ulp a right fold may
# move the output; see `_preserves`. Right folds measure about 1, wrong ones above 1000.
_SLACK = 16.0


def apply_scales(model: nn.Module, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold the given s (> 0, by group name) into `model`; return s of every consumer linear.

    The products are taken in fp32 and rounded once to the parameters' dtype. They are first tried
    beside the model on random token ids: unless its function is preserved, `SqCpuError` names the
    group at fault and the model stays as it was.
    """
    groups = {group.name: group for group in smoothing_groups(model)}
    for name in scales:
        if name not in groups:
            raise SqCpuError(f"the model has no smoothing group {name}; plan for this very model")
    chosen = {groups[name]: s for name, s in scales.items()}
    for group, s in chosen.items():
        if s.shape != (group.channels,) or not (s.isfinite() & (s > 0)).all():
            raise SqCpuError(
                f"group {group.name}: s must be {group.channels} positive finite numbers"
            )
    _refuse_shared_parameters(model, chosen)
    folded = _folded_parameters(model, chosen)
    _prove(model, chosen, folded)
    with torch.no_grad():
        for name, value in folded.items():
            model.get_parameter(name).copy_(value)
    return {name: group.widen(s) for group, s in chosen.items() for name in group.consumers}


def _folded_parameters(
    model: nn.Module, scales: Mapping[SmoothingGroup, Tensor]
) -> dict[str, Tensor]:
    """Return the changed parameters by full name, fp32 and not yet rounded."""
    folded: dict[str, Tensor] = {}

    def current(name: str) -> Tensor:
        # A linear can be a consumer of one group and the producer of another: fold on.
        return folded[name] if name in folded else model.get_parameter(name).detach().float()

    for group, s in scales.items():
        for consumer in group.consumers:
            folded[f"{consumer}.weight"] = current(f"{consumer}.weight") * group.widen(s)
        weight = current(f"{group.producer}.weight")
        rows = s if weight.dim() == 1 else s[:, None]
        folded[f"{group.producer}.weight"] = (weight + group.norm_offset) / rows - group.norm_offset
        if getattr(model.get_submodule(group.producer), "bias", None) is not None:
            folded[f"{group.producer}.bias"] = current(f"{group.producer}.bias") / s
    return folded


def _refuse_shared_parameters(model: nn.Module, scales: Mapping[SmoothingGroup, Tensor]) -> None:
    """Raise where folding a parameter for one use would break it under another name."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for group in scales:
        for module in (group.producer, *group.consumers):
            shared = names[id(model.get_parameter(f"{module}.weight"))]
            if len(shared) > 1:
                raise SqCpuError(
                    f"group {group.name} cannot be folded: {shared[0]} and {shared[1]} are the "
                    "same parameter; quantize unsmoothed with smooth=False"
                )


def _prove(
    model: nn.Module, scales: Mapping[SmoothingGroup, Tensor], folded: Mapping[str, Tensor]
) -> None:
    """Raise unless the folded parameters are finite and leave the model's function unchanged."""
    for name, value in folded.items():
        dtype = model.get_parameter(name).dtype
        if not torch.stack(value.aminmax()).to(dtype).isfinite().all():
            raise SqCpuError(
                f"folding makes {name} overflow {dtype}: convert the model to float32 first"
            )
    if not folded or _preserves(model, folded):
        return
    # Only on failure: fold the groups one by one to name the culprit.
    for group, s in scales.items():
        if not _preserves(model, _folded_parameters(model, {group: s})):
            raise SqCpuError(
                f"folding group {group.name} would change what the model computes, so something "
                "else uses its output; quantize unsmoothed with smooth=False"
            )
    raise SqCpuError(
        "folding would change what the model computes; quantize unsmoothed with smooth=False"
    )


def _preserves(model: nn.Module, folded: Mapping[str, Tensor]) -> bool:
    """Compare the model's output before and after, in fp32 whatever the model's dtype.

    In exact arithmetic a right fold changes nothing. In fp32 it rounds each touched parameter by at
    most a few half ulps, 2^-24 relative. How far that moves the output depends on the model, so it
    is measured: the same parameters are perturbed by one random ulp, up to 2^-23 relative, and the
    fold may move the output by no more than `_SLACK` times what that does. The rounding to a
    narrower dtype comes after, and is at most half an ulp of every parameter by construction.
    """
    generator = torch.Generator().manual_seed(0)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    config: Any = model.config
    length = min(16, getattr(config, "max_position_embeddings", 16))
    ids = torch.randint(embeddings.num_embeddings, (2, length), generator=generator)
    original = {name: p.detach().float() for name, p in model.named_parameters()}

    def output(parameters: Mapping[str, Tensor]) -> Tensor:
        changed = original | dict(parameters)
        result = functional_call(model, changed, (ids,), {"use_cache": False})
        return result[0].double()  # type: ignore[no-any-return]

    def perturbed(value: Tensor) -> Tensor:
        ulp = torch.finfo(torch.float32).eps
        return value * torch.empty_like(value).uniform_(1 - ulp, 1 + ulp, generator=generator)

    with evaluating(model):
        before = output({})
        if not before.isfinite().all():
            raise SqCpuError("the model gives NaN or Inf on random token ids; check its weights")
        bound = _SLACK * (output({n: perturbed(original[n]) for n in folded}) - before).norm()
        return bool((output(folded) - before).norm() <= bound)
