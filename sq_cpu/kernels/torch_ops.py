"""The kernels as torch operators: what torch sees where it traces, transforms or differentiates.

cpp/torch_ops.cc has their schemas and CPU kernels, so that a graph also runs without Python. What
only Python needs is here: results without values (for any number of rows), batches, FLOPs and
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.kernels import _core
from sq_cpu.kernels.hadamard import fwht64, whole_blocks
from sq_cpu.kernels.ops import ACTIVATION_KINDS, FLOATS, Epilogue, needs_gradient

__all__ = ["RESULT_TYPES", "LinearSettings", "call", "linear", "linear_settings"]

_core.add_torch_operators()
_OPS = torch.ops.sq_cpu

RESULT_TYPES = {dtype: number for number, dtype in enumerate((*FLOATS, torch.int32, torch.int8))}
"""The numbers that operators take for dtypes, which are those of BatchedType."""
_DTYPES = list(RESULT_TYPES)

_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda v: v,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "silu": nn.functional.silu,
}


LinearSettings = tuple[int, bool, bool, float, int, bool, int, int]
"""How the operator `linear` quantizes its input: granularity, symmetric, reduce_range, scale,
zero_point, dynamic_fallback, terms, hadamard."""


def linear_settings(
    activations: str = "per_token",
    symmetric: bool = True,
    reduce_range: bool = False,
    static: tuple[float, int] | None = None,
    dynamic_fallback: bool = False,
    hadamard: int = 0,
) -> LinearSettings:
    """Return those of a scheme, with the (scale, zero point) of a static one."""
    granularity, terms = ACTIVATION_KINDS[activations]
    scale, zero_point = static or (0.0, 0)
    falls_back = dynamic_fallback and static is not None
    settings = (int(granularity), symmetric, reduce_range, scale, zero_point, falls_back)
    return (*settings, terms, hadamard)


def call(operator: Any, *arguments: Any) -> Tensor:
    """Call an operator; what it refuses, but for a traced graph, is an `SqCpuError`."""
    if torch.compiler.is_compiling():
        return operator(*arguments)  # type: ignore[no-any-return]
    try:
        return operator(*arguments)  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise SqCpuError(first_line(error)) from error


def linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    inverse_smoothing: Tensor | None,
    settings: LinearSettings,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Return what `ops.linear` returns, by the operator; with gradients where they are asked for.

    A gradient goes straight through the rounding (and the clipping of static codes), as if the
    layer multiplied x / s by the weight that its codes stand for. With an epilogue y is rounded as
    its steps in plain torch are.
    """
    arguments = (packed, out_features, inverse_smoothing)
    if epilogue is None:
        if needs_gradient(x):
            return _straight_through(x, *arguments, settings)
        return call(_OPS.linear.default, x, *arguments, *settings, 0, None, None)
    epilogue.check((*x.shape[:-1], out_features), x.dtype)
    activation, other, residual = epilogue
    if needs_gradient(x, other, residual):
        v = _ACTIVATIONS[activation](_straight_through(x.float(), *arguments, settings))
        v = v if other is None else v * other.float()
        return (v if residual is None else v + residual.float()).to(x.dtype)
    steps = (epilogue.code(), other, residual)
    return call(_OPS.linear.default, x, *arguments, *settings, *steps)


class _StraightThrough(torch.autograd.Function):
    """y of a layer, and dx = H (dy * weight_scale) @ codes / s, H the rotation if there is one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        packed: Tensor,
        out_features: int,
        inverse_smoothing: Tensor | None,
        settings: LinearSettings,
    ) -> Tensor:
        arguments = (packed, out_features, inverse_smoothing, *settings, 0, None, None)
        return call(_OPS.linear.default, x, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, packed, ctx.out_features, inverse_smoothing, settings = inputs
        ctx.in_features, ctx.hadamard = x.shape[-1], settings[-1]
        ctx.save_for_backward(packed, inverse_smoothing)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _input_gradient(ctx, dy), None, None, None, None


def _input_gradient(ctx: Any, dy: Tensor) -> Tensor:
    packed, inverse_smoothing = ctx.saved_tensors
    rotated = ctx.hadamard != 0
    columns = whole_blocks(ctx.in_features) if rotated else ctx.in_features
    codes, scale = _OPS.unpack_weight.default(packed, ctx.out_features, columns)
    # Codes are exact in bf16; fp16 has too few exponents for dy times a scale.
    dtype = torch.bfloat16 if dy.dtype == torch.bfloat16 else torch.float32
    dx = ((dy.float() * scale).to(dtype) @ codes.to(dtype)).float()
    if rotated:
        dx = fwht64(dx)[..., : ctx.in_features]
    if inverse_smoothing is not None:
        dx = dx * inverse_smoothing
    result: Tensor = dx.to(dy.dtype)
    return result


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the operator's own gradient needs: of an exported layer, which has no `linear`."""
    x, packed, ctx.out_features, inverse_smoothing, *settings, activation, other, residual = inputs
    ctx.in_features, ctx.hadamard = x.shape[-1], settings[-1]
    ctx.has_steps = activation != 0 or other is not None or residual is not None
    ctx.save_for_backward(packed, inverse_smoothing)


def _gradient_of_operator(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.has_steps:
        raise SqCpuError(
            "the operator sq_cpu::linear has no gradient through its activation, other and "
            "residual: call the layer, which has, or apply them after it"
        )
    return _input_gradient(ctx, dy), *[None] * 14


def _straight_through(*arguments: Any) -> Tensor:
    return _StraightThrough.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


def _linear_without_values(
    x: Tensor, packed: Tensor, out_features: int, *_: Any, **__: Any
) -> Tensor:
    if x.dtype not in FLOATS or x.dim() == 0:
        raise SqCpuError(
            f"int8 linear: input is {x.dtype} of {x.dim()} dimensions; "
            "use float32, bfloat16 or float16, of one or more"
        )
    check_packed("linear: input is", x, packed, out_features, int(x.shape[-1]))
    return x.new_empty((*x.shape[:-1], out_features))


def _gather_rows_without_values(
    ids: Tensor,
    packed: Tensor,
    out_features: int,
    in_features: int,
    inverse_smoothing: Tensor | None,
    type: int,  # noqa: A002  the schema's name
) -> Tensor:
    check_packed("embedding: ids are", ids, packed, out_features, in_features)
    return ids.new_empty((*ids.shape, in_features), dtype=_DTYPES[type])


def _unpack_weight_without_values(
    packed: Tensor, out_features: int, in_features: int
) -> tuple[Tensor, Tensor]:
    check_packed("weight:", packed, packed, out_features, in_features)
    codes = packed.new_empty((out_features, in_features), dtype=torch.int8)
    return codes, packed.new_empty((out_features,), dtype=torch.float32)


def _batched_matmul_without_values(
    a: Tensor,
    b: Tensor,
    transposed: bool,
    scale: float,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    type: int,  # noqa: A002  the schema's name
) -> Tensor:
    return a.new_empty((*a.shape[:3], b.shape[2 if transposed else 3]), dtype=_DTYPES[type])


def check_packed(what: str, x: Tensor, packed: Tensor, out_features: int, in_features: int) -> None:
    """Raise `SqCpuError`, which says of `what` x is, for a weight elsewhere or of another size."""
    if x.device != packed.device:
        raise SqCpuError(f"int8 {what} on {x.device}, the weight on {packed.device}")
    size = _core.packed_bytes(out_features, in_features)
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.numel() != size:
        raise SqCpuError(
            f"int8 {what.partition(':')[0]}: {packed.numel()} elements of {packed.dtype} are not a "
            f"packed weight [{out_features}, {in_features}], which takes {size} of uint8"
        )


def _linear_of_batch(
    info: Any, in_dims: Sequence[int | None], *arguments: Any
) -> tuple[Tensor, int]:
    """Take a batch of inputs as more rows of one, but where all rows share what they show."""
    rows = {0, 13, 14}  # x, other, residual
    is_per_tensor = arguments[4] == int(_core.Granularity.per_tensor)
    given = list(enumerate(zip(arguments, in_dims, strict=True)))
    if is_per_tensor or any(dim is not None and i not in rows for i, (_, dim) in given):
        parts = [
            _OPS.linear(*(a if dim is None else a.select(dim, part) for _, (a, dim) in given))
            for part in range(info.batch_size)
        ]
        return torch.stack(parts), 0
    batched = list(arguments)
    for i, (x, dim) in given:
        if i in rows and x is not None:
            whole = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            batched[i] = whole
    return _OPS.linear(*batched), 0


@register_flop_formula(_OPS.linear)
def _linear_flop(
    x_shape: Sequence[int], packed_shape: Any, out_features: int, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(x_shape) * out_features


@register_flop_formula(_OPS.batched_matmul)
def _batched_matmul_flop(
    a_shape: Sequence[int], b_shape: Sequence[int], transposed: bool, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(a_shape) * b_shape[2 if transposed else 3]


for _name, _fake in (
    ("linear", _linear_without_values),
    ("gather_rows", _gather_rows_without_values),
    ("unpack_weight", _unpack_weight_without_values),
    ("batched_matmul", _batched_matmul_without_values),
):
    torch.library.register_fake(f"sq_cpu::{_name}", _fake)
torch.library.register_vmap("sq_cpu::linear", _linear_of_batch)
torch.library.register_autograd(
    "sq_cpu::linear", _gradient_of_operator, setup_context=_keep_for_gradient
)
