"""The proof that folding smoothing scales into a model's weights preserves its function."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from sq_cpu.errors import SqCpuError
from sq_cpu.models.calls import Example, called, copied, evaluating, is_cache
from sq_cpu.models.groups import SmoothingGroup
from sq_cpu.models.hooks import hooked, watching_inputs
from sq_cpu.models.padding import Padding, padding_of
from sq_cpu.models.unchanged import unchanged
from sq_cpu.smoothing.fold import folded_columns, folded_producer, producer_of
from sq_cpu.smoothing.rotation_proof import prove_rotations

__all__ = ["FoldProof", "Run", "prove_folds", "prove_with", "refused_folds", "running"]

Run = Callable[[], Sequence[Tensor]]
"""Calls a model, or the one block that holds all the groups, and returns its outputs.

None of them is a loss: a sum may be in another order each time, or of nothing.
"""

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class FoldProof:
    """Which folds preserve the function of a model and of its copies, whatever s is."""

    reasons: Mapping[SmoothingGroup, str]
    """Why a group cannot be folded; "" where it can."""
    norm_calls: Mapping[SmoothingGroup, _Arguments]
    """With what the norm before each group that can be folded was called last."""
    rotations: Mapping[SmoothingGroup, str] = field(default_factory=dict)
    """Why the values of a group that can be folded cannot be rotated; "" where they can."""

    def without(self, used: Mapping[str, str]) -> FoldProof:
        """Return the proof with no fold into linears whose weight is used elsewhere, name -> how.

        A hook does not change what other code reads of a weight, as folding does.
        """

        def reason(group: SmoothingGroup) -> str:
            names = (producer_of(group), *group.consumers)
            return next((f"{name}: {used[name]}" for name in names if name in used), "")

        return replace(self, reasons={g: why or reason(g) for g, why in self.reasons.items()})


def running(model: nn.Module, example: Example) -> Run:
    """Return what calls the model with an example and gives its outputs."""

    def run() -> list[Tensor]:
        outputs = called(model, copied(example), "the calibration's example")
        if isinstance(outputs, Mapping):
            outputs = [value for key, value in outputs.items() if not str(key).endswith("loss")]
        # All: a fold may spoil the second alone. But a cache, whose v folds change, is no output.
        leaves = tree_leaves(outputs, is_leaf=is_cache)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]

    return run


def prove_with(
    model: nn.Module,
    groups: Iterable[SmoothingGroup],
    example: Example | None,
    *,
    rotated: Collection[SmoothingGroup] = (),
) -> FoldProof:
    """Do what `prove_folds` does, with an example of a call of the model; None: nothing is proven.

    Positions of the example that are padding prove nothing.
    """
    if example is None:
        return prove_folds(model, groups, None)
    run, padding = running(model, example), padding_of(model, *example)
    return prove_folds(model, groups, run, padding, rotated=rotated)


def prove_folds(
    model: nn.Module,
    groups: Iterable[SmoothingGroup],
    run: Run | None,
    padding: Padding | None = None,
    *,
    rotated: Collection[SmoothingGroup] = (),
) -> FoldProof:
    """Prove of each group that has a producer whether it can be folded; change nothing.

    The proof is exact: a hook divides every producer's output by random powers of two, a hook
    multiplies every consumer's input by the same. Products with powers of two do not round, so in
    any dtype the outputs are equal bit for bit, unless something else uses what a producer gives or
    something between is not linear in it. What the hooks do to a linear, folding does to its
    weights by the definition of a matrix product. How a norm uses its weight, and whether the
    folded weights fit their dtype, depends on s: `refused_folds` tells.
    Hooks of the model's own on a linear see other values once s is in the weights: refused.
    Memory is that of two sets of outputs and of the norms' inputs, and the latter stay in the
    proof. What the model draws at random is the same in every run; afterwards its state is what it
    was, and so are the generators (see `unchanged`).
    `padding` is that of the call. Padding has to stay as it is, too, but it may be NaN, and a fold
    of which nothing else is seen is not proven.
    Of those among the groups that are `rotated`, `rotation_proof` tells more.

    Without `run` nothing can be folded; without groups nothing is run. Raises `SqCpuError` where
    the model gives NaN.
    """
    groups = [group for group in groups if group.producer is not None]
    if run is None:
        reason = "the calibration holds no example to prove it with"
        return FoldProof(dict.fromkeys(groups, reason), {})
    if not groups:
        return FoldProof({}, {})
    with evaluating(model):
        return _prove(model, groups, run, padding or Padding(), rotated)


def _prove(
    model: nn.Module,
    groups: Sequence[SmoothingGroup],
    run: Run,
    padding: Padding,
    rotated: Collection[SmoothingGroup],
) -> FoldProof:
    refused = _taken(model, groups)
    left = [group for group in groups if group not in refused]
    norms = {
        group: model.get_submodule(producer_of(group))
        for group in left
        if type(model.get_submodule(producer_of(group))) is not nn.Linear
    }
    calls: dict[nn.Module, _Arguments] = {}
    called: dict[nn.Module, bool] = {}
    seen: set[nn.Module] = set()

    def seeded() -> Sequence[Tensor]:
        # From the same state each time: what one run switches off for good, the next has too.
        with unchanged(model):
            torch.manual_seed(0)
            return run()

    with (
        padding.tracing(),
        _watching(model, left, norms.values(), calls, called),
        _seeing(model, left, padding, seen),
    ):
        expected = seeded()
        comparable = _comparable(expected, padding)
    for group in left:
        modules = [model.get_submodule(name) for name in (*group.consumers, producer_of(group))]
        if not comparable:
            refused[group] = "the model returns no tensor that could be compared"
        elif not called.keys() >= set(modules):
            refused[group] = "the example never reaches it, so the fold cannot be proven"
        elif not seen.issuperset(modules[:-1]):
            refused[group] = "the example reaches it with padding alone, which proves no fold"
        elif not called[modules[-1]]:
            refused[group] = f"{group.producer} does not return a tensor with its channels last"

    def preserved(groups: Sequence[SmoothingGroup]) -> bool:
        with _rescaled(model, groups):
            found = seeded()
        return all(_equal(a, b) for a, b in zip(expected, found, strict=True))

    for group in _culprits([group for group in left if group not in refused], preserved):
        refused[group] = _reason(model, group, seeded)
    return FoldProof(
        {group: refused.get(group, "") for group in groups},
        {group: calls[norm] for group, norm in norms.items() if group not in refused},
        prove_rotations(model, [g for g in rotated if g in left and g not in refused], seeded),
    )


def refused_folds(
    model: nn.Module,
    scales: Mapping[SmoothingGroup, Tensor],
    proof: FoldProof,
    blocks: Mapping[SmoothingGroup, int] = MappingProxyType({}),
) -> dict[SmoothingGroup, str]:
    """Return which of the folds would change the function of the model, and why; change nothing.

    `scales` has s for groups that the proof, of this model or one that it is a copy of, has looked
    at, and `blocks` is as for `apply_folds`. A group that can be folded is refused where its s
    makes a weight overflow, and where its norm, called with the folded weights, moves by more than
    rounding.

    Raises `SqCpuError` for an s that is not positive and finite.
    """
    for group, s in scales.items():
        if s.shape != (group.layout.channels,) or not (s.isfinite() & (s > 0)).all():
            raise SqCpuError(
                f"group {group.name}: s must be {group.layout.channels} positive finite numbers"
            )
    with evaluating(model):
        reasons = {
            group: proof.reasons[group]
            or _unfit(model, group, s, proof.norm_calls.get(group), blocks.get(group, 0))
            for group, s in scales.items()
        }
    return {group: reason for group, reason in reasons.items() if reason}


def _comparable(outputs: Iterable[Tensor], padding: Padding) -> bool:
    """Return whether the outputs show anything beside padding; raise where that is NaN."""
    found = False
    for output in outputs:
        kept = padding.kept(output)
        shown = output if kept is None else output.flatten(0, -2)[kept]
        is_nan = shown.isnan()
        # Of what has a row for each token, padding is known; -inf may be a mask.
        if is_nan.any() and not (kept is None and padding.masks):
            raise SqCpuError("the model gives NaN; check its weights and the batches")
        found = found or not bool(is_nan.all())
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _taken(model: nn.Module, groups: Iterable[SmoothingGroup]) -> dict[SmoothingGroup, str]:
    """Return the groups with weights that something else has a part in, and why.

    A module that the model holds twice shares nothing: it is one, and the proof sees all its calls.
    """
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(path, recurse=False):
            names.setdefault(parameter.data_ptr(), []).append(key)
    refused = {}
    for group in groups:
        producer = model.get_submodule(producer_of(group))
        folded = [model.get_parameter(f"{name}.weight") for name in group.consumers]
        folded += producer.parameters(recurse=False)
        for shared in (names[parameter.data_ptr()] for parameter in folded):
            if len(shared) > 1:
                refused[group] = f"{shared[0]} and {shared[1]} are the same parameter"
        for name in (producer_of(group), *group.consumers):
            module = model.get_submodule(name)
            hooks = module._forward_hooks or module._forward_pre_hooks
            if hooks and isinstance(module, nn.Linear):
                refused[group] = f"{name} has forward hooks, which would see other values"
    return refused


def _unfit(
    model: nn.Module, group: SmoothingGroup, s: Tensor, norm_call: _Arguments | None, block: int
) -> str:
    """Return why the group's weights cannot take this s; "" if they can."""
    for name in (producer_of(group), *group.consumers):
        weight = model.get_parameter(f"{name}.weight")
        if weight.dtype == torch.float16 and not _fits(model, group, s, name, block):
            return f"{name}.weight would overflow float16"
    if norm_call is None:
        return ""
    return _norm_error(model.get_submodule(producer_of(group)), group, s, norm_call)


def _fits(model: nn.Module, group: SmoothingGroup, s: Tensor, name: str, block: int) -> bool:
    module = model.get_submodule(name)
    values = (
        folded_producer(module, group, s, block).values()
        if name == group.producer
        else [folded_columns(module.get_parameter("weight").detach(), group.layout.widen(s), block)]
    )
    return all(bool(value.half().isfinite().all()) for value in values)


def _norm_error(norm: nn.Module, group: SmoothingGroup, s: Tensor, call: _Arguments) -> str:
    """Return why the folded norm does not give its output / s; "" if it does."""
    args, kwargs = call
    y = norm(*args, **kwargs)
    folded = {
        name: value.to(norm.get_parameter(name).dtype)
        for name, value in folded_producer(norm, group, s).items()
    }
    y_folded = functional_call(norm, folded, args, kwargs).float() * s
    y = y.float().reshape(-1, group.layout.channels)
    size = y.abs().amax(dim=0)
    if "bias" in folded:  # it may cancel the product, whose rounding stays
        size = size + norm.get_parameter("bias").detach().float().abs()
    # Weight, bias, and y are rounded by half an ulp each, in both calls; twice that for the sums.
    # In fp32 more is harmless (offset norms round w, not 1 + w): int8 keeps 2^-8.
    bound = max(8 * torch.finfo(norm.get_parameter("weight").dtype).eps, 2.0**-14) * size
    moved = (y_folded.reshape(-1, group.layout.channels) - y).abs().amax(dim=0)
    if (moved <= bound).all():
        return ""
    dtype = str(norm.get_parameter("weight").dtype).removeprefix("torch.")
    return f"{group.producer} with folded weights is more than rounding in {dtype} away"


def _powers_of_two(group: SmoothingGroup) -> Tensor:
    # Its own for every group: with one s for all, two norms in each other's place would pass.
    generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
    # At most 1: dividing cannot make a number subnormal, and 1/8 seldom overflows one.
    powers = torch.randint(0, 4, (group.layout.channels,), generator=generator, device="cpu")
    powers[0] = max(int(powers[0]), 1)  # never all ones
    return torch.exp2(-powers.float())


@contextmanager
def _rescaled(model: nn.Module, groups: Sequence[SmoothingGroup]) -> Iterator[None]:
    """Divide the outputs of producers, and multiply the inputs of consumers, by powers of two."""
    before: list[tuple[nn.Module, Any]] = []
    after: list[tuple[nn.Module, Any]] = []

    def divide(by: Tensor) -> Any:
        return lambda _module, _args, _kwargs, output: output / by.to(output.dtype)

    def multiply(by: Tensor) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (args[0] * by.to(args[0].dtype), *args[1:]), kwargs
            return args, kwargs | {"input": kwargs["input"] * by.to(kwargs["input"].dtype)}

        return hook

    for group in groups:
        s = _powers_of_two(group)
        producer = model.get_submodule(producer_of(group))
        by = group.layout.spread(s, producer.get_parameter("weight").shape[0])
        after.append((producer, divide(by)))
        for name in group.consumers:
            before.append((model.get_submodule(name), multiply(group.layout.widen(s))))
    with hooked(before=before, after=after):
        yield


@contextmanager
def _watching(
    model: nn.Module,
    groups: Sequence[SmoothingGroup],
    norms: Any,
    calls: dict[nn.Module, _Arguments],
    called: dict[nn.Module, bool],
) -> Iterator[None]:
    """Note which modules of the groups are called, and with what the norms are.

    `called` says of each whether its output has a channel for each row of its weight, last.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in kept:
            # Copies, for what follows may write to them.
            calls[module] = tree_map_only(Tensor, Tensor.clone, (args, kwargs))

    def after(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        outputs = len(module.get_parameter("weight"))
        fits = isinstance(output, Tensor) and output.dim() > 0 and output.shape[-1] == outputs
        called[module] = fits and called.get(module, True)

    kept = set(norms)
    modules = {
        model.get_submodule(name)
        for group in groups
        for name in (producer_of(group), *group.consumers)
    }
    with hooked(before=((m, before) for m in kept), after=((m, after) for m in modules)):
        yield


@contextmanager
def _seeing(
    model: nn.Module,
    groups: Sequence[SmoothingGroup],
    padding: Padding,
    seen: set[nn.Module],
) -> Iterator[None]:
    """Note which consumers get a row that is no padding."""

    def take(name: str, x: Tensor) -> None:
        kept = padding.kept(x)
        if kept is None or kept.any():
            seen.add(model.get_submodule(name))

    consumers = {name: model.get_submodule(name) for g in groups for name in g.consumers}
    with watching_inputs(consumers, "input", take):
        yield


def _culprits(
    groups: Sequence[SmoothingGroup], preserved: Callable[[Sequence[SmoothingGroup]], bool]
) -> list[SmoothingGroup]:
    """Return the groups that are not preserved, by halving."""
    if not groups or preserved(groups):
        return []
    if len(groups) == 1:
        return list(groups)
    middle = len(groups) // 2
    return _culprits(groups[:middle], preserved) + _culprits(groups[middle:], preserved)


def _reason(model: nn.Module, group: SmoothingGroup, run: Callable[[], Any]) -> str:
    """Say who else takes the producer's output, where a module does."""
    readers: list[str] = []
    outputs: list[Tensor] = []  # kept, so that no other tensor gets their memory

    def give(_module: nn.Module, _args: Any, _kwargs: Any, output: Tensor) -> None:
        outputs.append(output)

    def take(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and any(_same_memory(tensor, o) for o in outputs):
                    readers.append(f"{name} ({type(module).__name__})")

        return hook

    others = [
        (module, take(name))
        for name, module in model.named_modules()
        if name not in group.consumers and not any(True for _ in module.children())
    ]
    with hooked(before=others, after=[(model.get_submodule(producer_of(group)), give)]):
        run()
    if readers:
        return f"{readers[0]} takes the output of {group.producer}"
    return f"something else uses the output of {group.producer}, or is not linear in it"


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
