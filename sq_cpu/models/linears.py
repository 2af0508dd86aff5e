"""Every linear layer of a model as an `nn.Linear`, whatever the model's code makes of it.

transformers has linears that are not `nn.Linear`: Conv1D (GPT-2) keeps its weight transposed,
FalconLinear is a subclass, and the experts of a mixture are slices of one 3-D parameter.
`linearize` puts an `nn.Linear` in the place of each; the weights stay where they are, seen through
views, so that what is folded into one is folded into the other. Later stages know `nn.Linear`
alone.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sq_cpu.errors import SqCpuError
from sq_cpu.models.checks import additions
from sq_cpu.models.hf_private import ExpertsLayout, experts_activation, experts_layout

__all__ = [
    "LINEAR_TYPES",
    "Experts",
    "as_linears",
    "check_ignore",
    "contiguous_linears",
    "float_linears",
    "free_experts",
    "head_of",
    "is_ignored",
    "linearize",
    "linearized",
    "quantizable_linears",
    "restore_modules",
]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear over these very tensors, weight [out_features, in_features]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear.eval()


def _of_conv1d(module: Any) -> nn.Linear:
    return _linear(module.weight.T, module.bias)


def _of_subclass(module: Any) -> nn.Linear:
    return _linear(module.weight, module.bias)


# By the class's full name, so that no model's code is imported for it.
LINEAR_TYPES: dict[str, Callable[[Any], nn.Linear]] = {
    "transformers.pytorch_utils.Conv1D": _of_conv1d,
    "transformers.models.falcon.modeling_falcon.FalconLinear": _of_subclass,
}
"""Classes that compute x W^T + b under another name, and how to see them as an `nn.Linear`."""


class _Expert(nn.Module):
    """One expert: down(gate(up(x))), or down(act(up(x))) without a gate."""

    def __init__(self, up: nn.Linear, up_name: str, down: nn.Linear) -> None:
        super().__init__()
        self.up_name = up_name
        self.add_module(up_name, up)
        self.down_proj = down

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        result: Tensor = self.down_proj(activation(self.get_submodule(self.up_name)(x)))
        return result


class Experts(nn.ModuleList):
    """The experts of a mixture, each with linears of its own, called as transformers calls its own.

    Children "0", "1", ... have `gate_up_proj` (`up_proj` where there is no gate) and `down_proj`.
    """

    def __init__(self, experts: Any, layout: ExpertsLayout) -> None:
        up_name = layout.up_name
        ups, downs = getattr(experts, up_name), experts.down_proj
        up_biases = getattr(experts, f"{up_name}_bias", None)
        down_biases = getattr(experts, "down_proj_bias", None)

        def linear(weights: Tensor, bias: Tensor | None, index: int) -> nn.Linear:
            weight = weights[index].T if layout.transposed else weights[index]
            return _linear(weight, None if bias is None else bias[index])

        super().__init__(
            _Expert(linear(ups, up_biases, i), up_name, linear(downs, down_biases, i))
            for i in range(len(downs))
        )
        # The class's own gating, without a hold on the 3-D weights. No child: it has no parameters.
        shell = copy.copy(experts)
        shell._parameters = {}
        self.__dict__["_shell"] = shell
        self.eval()

    def _activation(self, x: Tensor) -> Tensor:
        # Looked up here: pickle could not find the method by the name that it was defined with.
        return experts_activation(self.__dict__["_shell"], x)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, [tokens, hidden].

        `top_k_index` and `top_k_weights` are [tokens, k]; an index past the last expert is none.
        """
        result = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if index >= len(self):
                continue
            token, choice = torch.where(top_k_index == index)
            y = self[index](hidden_states[token], self._activation)
            y = y * top_k_weights[token, choice, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result


def as_linears(module: nn.Module) -> nn.Module | None:
    """Return what replaces `module`, or None where nothing has to."""
    convert: Callable[[Any], nn.Module] | None
    convert = LINEAR_TYPES.get(f"{type(module).__module__}.{type(module).__qualname__}")
    if convert is None and (layout := experts_layout(module)) is not None:
        convert = partial(Experts, layout=layout)
    if convert is None:
        return None
    if added := additions(module):
        raise SqCpuError(f"a {type(module).__name__} of the model {added}")
    return convert(module)


def linearize(model: nn.Module) -> dict[tuple[nn.Module, str], nn.Module]:
    """Put linears in the place of every module that hides some; return what stood where.

    The function of the model stays, up to rounding in the order of sums. A module that the model
    holds twice is replaced by one. On an error the model is as it was.
    """
    new: dict[nn.Module, nn.Module | None] = {}
    places = [
        (parent, key, child)
        for parent in list(model.modules())
        for key, child in parent._modules.items()
        if child is not None
    ]
    for _, _, child in places:
        if child not in new:
            new[child] = as_linears(child)
    replaced: dict[tuple[nn.Module, str], nn.Module] = {}
    for parent, key, child in places:
        replacement = new[child]
        if replacement is not None:
            setattr(parent, key, replacement)
            replaced[parent, key] = child
    return replaced


@contextmanager
def linearized(model: nn.Module) -> Iterator[None]:
    """Run a block with the model linearized; afterwards its own modules are back."""
    replaced = linearize(model)
    try:
        yield
    finally:
        restore_modules(replaced)


def restore_modules(replaced: Mapping[tuple[nn.Module, str], nn.Module]) -> None:
    """Put back what `linearize` replaced."""
    for (parent, key), child in replaced.items():
        setattr(parent, key, child)


def free_experts(model: nn.Module) -> None:
    """Copy the float experts beside quantized ones, whose 3-D parameter they would keep alive."""
    for experts in model.modules():
        if not isinstance(experts, Experts):
            continue
        linears = [module for module in experts.modules() if type(module) is nn.Linear]
        used: Counter[int] = Counter()
        for linear in linears:
            used[linear.weight.untyped_storage().data_ptr()] += linear.weight.nbytes
        for linear in linears:
            storage = linear.weight.untyped_storage()
            if used[storage.data_ptr()] < storage.nbytes():
                linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)


def contiguous_linears(model: nn.Module) -> None:
    """Lay float weights out as a checkpoint does, so that a loaded model adds in the same order.

    Those of a Conv1D, and of some experts, are transposed views.
    """
    for linear in model.modules():
        if type(linear) is nn.Linear and not linear.weight.is_contiguous():
            linear.weight = nn.Parameter(linear.weight.detach().contiguous(), requires_grad=False)


def quantizable_linears(
    model: nn.Module, ignore: tuple[str, ...] = (), but: str | None = None
) -> dict[str, nn.Linear]:
    """Return the linears of a linearized model by full name; one held twice, by its first name.

    Left out are those that `is_ignored` says, `but` for one. Only `nn.Linear` itself: a subclass
    may compute something else, or (the output projection of `nn.MultiheadAttention`) never be
    called. Nor one that a plain list holds, too: the model may call it from there, where nothing
    replaces it.
    """
    held = _held_plainly(model)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module not in held
        and (name == but or not is_ignored(model, name, ignore))
    }


def _held_plainly(model: nn.Module) -> set[nn.Linear]:
    """Return the linears in attributes that are no submodules: in lists, tuples and tables."""
    submodules = vars(nn.Module()).keys()
    values = [v for m in model.modules() for key, v in vars(m).items() if key not in submodules]
    leaves = (leaf for value in values for leaf in tree_leaves(value))
    return {leaf for leaf in leaves if isinstance(leaf, nn.Linear)}


def float_linears(
    model: nn.Module, ignore: tuple[str, ...], but: str | None = None
) -> dict[str, str]:
    """Return, of a linearized model, what `quantizable_linears` leaves out: name -> reason.

    That is linears, and matrices that are the parameters of other modules: routers of mixtures, and
    what `nn.MultiheadAttention` keeps for itself.
    """
    kept = {}
    held = _held_plainly(model)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.Linear) and name != but and is_ignored(model, name, ignore):
            kept[name] = "ignored"
        elif isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            kept[name] = f"a {kind}, which may compute something else"
        elif module in held:
            kept[name] = "a plain list or table of the model holds it, too, and may call it"
        elif "Experts" in kind and any(p.dim() == 3 for p in module.parameters(recurse=False)):
            kept[name] = f"{kind} keeps its weights in a layout that sq_cpu does not know"
        elif not isinstance(module, nn.Linear | nn.Embedding):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 2:
                    kept[f"{name}.{key}".removeprefix(".")] = f"a matrix of a {kind}, no linear"
    return kept


def check_ignore(model: nn.Module, ignore: tuple[str, ...]) -> None:
    """Raise `SqCpuError` for an entry that ignores no linear, which is most likely a typo.

    "lm_head", the default, is let through: it stands for a head where there is one.
    """
    if isinstance(ignore, str):
        raise SqCpuError(f"ignore is {ignore!r}, not a tuple of names: use ({ignore!r},)")
    if not isinstance(ignore, Collection) or not all(isinstance(each, str) for each in ignore):
        raise SqCpuError(f"ignore is {ignore!r}, not a tuple of names, as in ('lm_head',)")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for entry in ignore:
        if entry != "lm_head" and not any(is_ignored(model, name, (entry,)) for name in names):
            close = " or ".join(_nearest(entry, names)) or "the end of a linear's or module's path"
            raise SqCpuError(f"ignore has {entry!r}, which matches no linear: use {close}")


def _nearest(entry: str, linears: list[str]) -> list[str]:
    # Parts of paths that have as many components.
    count = entry.count(".") + 1
    parts = dict.fromkeys(
        ".".join(path[start : start + count])
        for path in (name.split(".") for name in linears)
        for start in range(len(path) - count + 1)
    )
    return get_close_matches(entry, parts)


def is_ignored(model: nn.Module, name: str, ignore: tuple[str, ...]) -> bool:
    """Say whether an entry of `ignore` names a linear, by its full name, or a module that holds it.

    An entry may be the end of such a path alone. "lm_head" also stands for the model's output
    embeddings, whatever their name.
    """
    if any(f".{entry}." in f".{name}." for entry in ignore):
        return True
    return "lm_head" in ignore and model.get_submodule(name) is head_of(model)


def head_of(model: Any) -> nn.Module | None:
    """Return what makes logits of hidden states, of a model of transformers; None: unknown."""
    try:
        head: nn.Module | None = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head
