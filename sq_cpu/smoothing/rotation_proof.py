"""The proof that values can be rotated in the weights: attention treats a head's channels alike.

A rotation rounds, unlike the powers of two of `proof`. So what holds both linears (attention) is
run in fp64, as it is and with its values rotated and rotated back: between the two lies what has to
be one linear map for all channels of a block. That no other module takes the values, `proof` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from sq_cpu.errors import first_line
from sq_cpu.kernels.hadamard import rotated
from sq_cpu.models.calls import is_cache
from sq_cpu.models.groups import NO_BLOCKS, SmoothingGroup
from sq_cpu.models.hooks import hooked
from sq_cpu.smoothing.fold import producer_of

__all__ = ["prove_rotations"]

# Of the greatest output. Sums of 10^4 products err by 10^4 eps, 2^-39, at most; a wrong head by
# the size of the outputs.
_BOUND = 2.0**-30


def prove_rotations(
    model: nn.Module, groups: Iterable[SmoothingGroup], run: Callable[[], Any]
) -> dict[SmoothingGroup, str]:
    """Return of each group why its values cannot be rotated by its `head_block`; "": they can.

    `run` calls the model, or the block that holds all the groups. Memory is that of one linear's
    weight in fp64, and of one module's inputs and outputs.
    """
    reasons = dict.fromkeys(groups, "the example never reaches what it lies in")
    running: set[nn.Module] = set()

    def prove(group: SmoothingGroup) -> Any:
        seen = False

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal seen
            if module in running or (seen and reasons[group]):
                return
            running.add(module)
            reasons[group] = _moved(model, group, module, args, kwargs)
            running.remove(module)
            seen = True

        return hook

    hooks = []
    for group in list(reasons):
        if not group.head_block:
            reasons[group] = NO_BLOCKS
        else:
            hooks.append((model.get_submodule(_around(group)), prove(group)))
    if hooks:
        with hooked(before=hooks):
            run()
    return reasons


def _around(group: SmoothingGroup) -> str:
    """Return the full name of the smallest module that holds a group's linears; "": the model."""
    paths = [name.split(".")[:-1] for name in (producer_of(group), *group.consumers)]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def _moved(
    model: nn.Module,
    group: SmoothingGroup,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str:
    """Return why a call does not give the same with rotated values; "" if it does."""
    block = group.head_block

    def rotate(_module: nn.Module, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
        return group.layout.rotate(output, block)

    def rotate_back(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (rotated(args[0], block), *args[1:]), kwargs
        return args, kwargs | {"input": rotated(kwargs["input"], block)}

    linears = {name for name, each in module.named_modules() if isinstance(each, nn.Linear)}
    tensors = chain(module.named_parameters(), module.named_buffers())
    state = {
        name: _in_fp64(tensor.detach())
        for name, tensor in tensors
        if name.rpartition(".")[0] not in linears
    }

    def outputs() -> list[Tensor]:
        given, named = tree_map(_in_fp64, (args, kwargs), is_leaf=is_cache)
        with _LinearsInFp64():
            returned = functional_call(module, state, given, named)
        leaves = tree_leaves(returned, is_leaf=is_cache)
        return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]

    try:
        expected = outputs()
        consumers = [(model.get_submodule(name), rotate_back) for name in group.consumers]
        with hooked(before=consumers, after=[(model.get_submodule(producer_of(group)), rotate)]):
            found = outputs()
    except Exception as error:  # of the model's own code, which may want one dtype
        return f"{type(module).__name__} does not run in fp64 ({first_line(error)})"
    if not expected or not _close(expected, found):
        return f"{type(module).__name__} does not treat the channels of a head alike"
    return ""


class _LinearsInFp64(TorchFunctionMode):
    """Linears compute in fp64, and no two weights are in it at once."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            args, kwargs = tree_map(_in_fp64, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _in_fp64(value: Any) -> Any:
    if is_cache(value):
        return None  # it would take the keys and values of this call
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    return value


def _close(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Return whether outputs differ by rounding alone; NaN, of padding, is where NaN was."""

    def close(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return False
        largest = a.nan_to_num().abs().amax() if a.numel() else 0.0
        return bool(((a - b).nan_to_num().abs() <= _BOUND * largest).all())

    return all(close(a, b) for a, b in zip(expected, found, strict=True))
