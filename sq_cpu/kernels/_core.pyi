"""The C++ library (cpp/include/sq_cpu). Addresses are those of contiguous CPU tensors."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

MAX_DEPTH: int

class _Enum:
    __members__: ClassVar[dict[str, Any]]
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...

class DType(_Enum):
    float32: ClassVar[DType]
    bfloat16: ClassVar[DType]
    float16: ClassVar[DType]

class Granularity(_Enum):
    per_token: ClassVar[Granularity]
    per_tensor: ClassVar[Granularity]
    static: ClassVar[Granularity]

class Activation(_Enum):
    none: ClassVar[Activation]
    relu: ClassVar[Activation]
    gelu: ClassVar[Activation]
    gelu_tanh: ClassVar[Activation]
    silu: ClassVar[Activation]

class ActivationQuantizer:
    def __init__(
        self,
        granularity: Granularity,
        symmetric: bool,
        reduce_range: bool,
        scale: float = 0.0,
        zero_point: int = 0,
        inverse_smoothing: Sequence[float] = (),
    ) -> None: ...
    @property
    def max_code(self) -> int: ...

# Blind to torch.compile's tracer; see ops.is_plain.
def is_plain(x: object) -> bool: ...
def isa() -> dict[str, Any]: ...
def microkernel_name(max_code: int, m: int) -> str: ...
def use_isa(name: str, emulated: bool = False) -> None: ...
def packed_bytes(n: int, k: int) -> int: ...
def pack_weight(weight: int, scale: int, bias: int, n: int, k: int, out: int) -> None: ...
def unpack_weight(packed: int, n: int, k: int, weight: int, scale: int, bias: int) -> None: ...
def codes_bytes(m: int, k: int) -> int: ...

# Called without keywords, as a layer's call must be short; other and residual may be 0.
def linear(
    x: int,
    x_type: DType,
    m: int,
    packed: int,
    n: int,
    k: int,
    quantizer: ActivationQuantizer,
    y: int,
    activation: Activation,
    other: int,
    residual: int,
    /,
) -> None: ...

# Of x [..., in_features]; None for a call that ops.linear must prepare or refuse, or torch sees.
def linear_tensor(
    x: object,
    packed: Tensor,
    in_features: int,
    out_features: int,
    quantizer: ActivationQuantizer,
    /,
) -> Tensor | None: ...
def quantize_activations(
    x: int,
    x_type: DType,
    m: int,
    k: int,
    quantizer: ActivationQuantizer,
    codes: int,
    scale: int,
    zero_point: int,
    /,
) -> None: ...
def linear_quantized(
    codes: int,
    scale: int,
    zero_point: int,
    m: int,
    max_code: int,
    packed: int,
    n: int,
    k: int,
    y: int,
    y_type: DType,
    activation: Activation,
    other: int,
    residual: int,
    /,
) -> None: ...
def linear_requantized(
    codes: int,
    scale: int,
    zero_point: int,
    m: int,
    max_code: int,
    packed: int,
    n: int,
    k: int,
    y_quantizer: ActivationQuantizer,
    y_codes: int,
    y_scale: int,
    y_zero_point: int,
    operand_type: DType,
    activation: Activation,
    other: int,
    residual: int,
    /,
) -> None: ...
def gemm(
    codes: int,
    zero_point: int,
    m: int,
    max_code: int,
    packed: int,
    n: int,
    k: int,
    y: int,
) -> None: ...
def count_saturation(
    codes: int,
    zero_point: int,
    m: int,
    max_code: int,
    packed: int,
    n: int,
    k: int,
) -> tuple[int, int]: ...

class BatchedType(_Enum):
    float32: ClassVar[BatchedType]
    bfloat16: ClassVar[BatchedType]
    float16: ClassVar[BatchedType]
    int32: ClassVar[BatchedType]
    int8: ClassVar[BatchedType]

def batched_matmul(
    batch: int,
    heads: int,
    kv_heads: int,
    m: int,
    n: int,
    k: int,
    a: int,
    a_is_signed: bool,
    a_strides: tuple[int, ...],
    a_scale: int,
    b: int,
    b_rows_are_n: bool,
    b_strides: tuple[int, ...],
    b_scale: int,
    alpha: float,
    y: int,
    y_type: BatchedType,
    y_strides: tuple[int, ...],
) -> None: ...
