"""Folding a smoothing scale into the weights, with the proof that the function is preserved.

Producer: output channels / s (a norm's weight and bias, a linear's rows and bias). Consumers: input
columns * s. Right if, and only if, the group holds every consumer of the producer's output; the
family's row says so, and `apply_scales` checks it on the model at hand before it changes anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from sq_cpu.calibrate import evaluating
from sq_cpu.errors import SqCpuError
from sq_cpu.families import SmoothingGroup, smoothing_groups

__all__ = ["apply_scales"]

# How much further than a random perturbation of the touched weights by one ulp a right fold may
# move the output; see `_Block.preserved_by`. Right folds measure 0.3 to 2; leaking 1 % of a norm's
# output to the residual, with s of 10 % spread, above 200.
_SLACK = 16.0

_Scales = Mapping[SmoothingGroup, Tensor]


def apply_scales(model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Fold the given s (> 0, by group name) into `model`.

    The products are taken in fp32 and rounded once to the parameters' dtype. They are first tried
    beside the model, on what random token ids give each decoder block for input: unless the
    function of every block is preserved, `SqCpuError` names the group at fault and the model stays
    as it was.

    Extra memory is three fp32 copies of one decoder block's parameters (two for an fp32 model),
    and the activations of 32 tokens; time is that of about four calls of the model on them.
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
    by_block: dict[str, dict[SmoothingGroup, Tensor]] = {}
    for group, s in chosen.items():
        by_block.setdefault(group.block, {})[group] = s

    with evaluating(model):
        for block in _blocks(model, by_block):
            _prove(model, block, by_block[block.name])
    with torch.no_grad():
        for block_scales in by_block.values():
            for name, value in _folded_parameters(model, block_scales).items():
                model.get_parameter(name).copy_(value)


def _folded_parameters(model: nn.Module, scales: _Scales) -> dict[str, Tensor]:
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


def _refuse_shared_parameters(model: nn.Module, scales: _Scales) -> None:
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


def _prove(model: nn.Module, block: _Block, scales: _Scales) -> None:
    """Raise unless the folded parameters are finite and leave the block's function unchanged."""
    folded = _folded_parameters(model, scales)
    for name, value in folded.items():
        dtype = model.get_parameter(name).dtype
        if not torch.stack(value.aminmax()).to(dtype).isfinite().all():
            raise SqCpuError(
                f"folding makes {name} overflow {dtype}: convert the model to float32 first"
            )
    if block.preserved_by(folded):
        return
    del folded
    # Only on failure: fold the groups one by one to name the culprit.
    for group, s in scales.items():
        if not block.preserved_by(_folded_parameters(model, {group: s})):
            raise SqCpuError(
                f"folding group {group.name} would change what the model computes, so something "
                "else uses its output; quantize unsmoothed with smooth=False"
            )
    raise SqCpuError(
        f"folding {block.name} would change what the model computes; quantize unsmoothed with "
        "smooth=False"
    )


def _blocks(model: nn.Module, names: Mapping[str, object]) -> Iterator[_Block]:
    """Yield the named decoder blocks, each with its input when the model reads random token ids."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    length = min(16, getattr(config, "max_position_embeddings", 16))
    ids = torch.randint(embeddings.num_embeddings, (2, length), generator=generator)
    inputs: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs[name] = _as_fp32((args, kwargs))

        return keep

    handles = [
        model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)
        for name in names
    ]
    try:
        output = model(ids, use_cache=False)[0]
    finally:
        for handle in handles:
            handle.remove()
    if not output.isfinite().all():
        raise SqCpuError("the model gives NaN or Inf on random token ids; check its weights")
    for name in names:
        if name not in inputs:
            raise SqCpuError(
                f"the model never calls {name}, so its fold cannot be checked; quantize "
                "unsmoothed with smooth=False"
            )
        yield _Block(name, model.get_submodule(name), *inputs[name])


def _as_fp32(values: Any) -> Any:
    """Copy every tensor of a nest of arguments, the floats in fp32."""

    def copied(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return tensor.to(dtype, copy=True)

    return tree_map_only(Tensor, copied, values)


@dataclass(frozen=True)
class _Block:
    """A decoder block and one input of it, fp32 whatever the model's dtype."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def preserved_by(self, folded: Mapping[str, Tensor]) -> bool:
        """Compare the block's output before and after, in fp32 whatever the model's dtype.

        In exact arithmetic a right fold changes nothing. In fp32 it rounds each touched parameter
        by at most a few half ulps, 2^-24 relative. How far that moves the output depends on the
        block, so it is measured: the same parameters are perturbed by one random ulp, up to 2^-23
        relative, and the fold may move the output by no more than `_SLACK` times what that does.
        The rounding to a narrower dtype comes after, and is at most half an ulp of every parameter
        by construction.
        """
        prefix = f"{self.name}." if self.name else ""
        changed = {name.removeprefix(prefix): value for name, value in folded.items()}
        state = (*self.module.named_parameters(), *self.module.named_buffers())
        # For an fp32 block these are the tensors themselves, not copies.
        original = {n: t.detach().float() if t.is_floating_point() else t for n, t in state}
        ulp = torch.finfo(torch.float32).eps
        generator = torch.Generator().manual_seed(0)

        def output(parameters: Mapping[str, Tensor]) -> Tensor:
            # Copies, for a block may write to its input.
            args, kwargs = _as_fp32((self.args, self.kwargs))
            result = functional_call(self.module, original | dict(parameters), args, kwargs)
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            return torch.cat([tensor.double().reshape(-1) for tensor in tensors])

        def perturbed(name: str) -> Tensor:
            noise = torch.empty_like(original[name]).uniform_(1 - ulp, 1 + ulp, generator=generator)
            return noise.mul_(original[name])

        before = output({})
        after = output(changed)
        bound = _SLACK * (output({name: perturbed(name) for name in changed}) - before).norm()
        return bool((after - before).norm() <= bound)
