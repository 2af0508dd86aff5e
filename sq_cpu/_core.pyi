"""The C++ library (cpp/include/sq_cpu). Addresses are those of contiguous CPU tensors."""

from typing import Any, ClassVar

MAX_DEPTH: int

class DType:
    float32: ClassVar[DType]
    bfloat16: ClassVar[DType]
    float16: ClassVar[DType]

class Granularity:
    per_token: ClassVar[Granularity]
    per_tensor: ClassVar[Granularity]
    static: ClassVar[Granularity]

class ActivationQuantizer:
    def __init__(
        self,
        granularity: Granularity,
        symmetric: bool,
        reduce_range: bool,
        scale: float = 0.0,
        zero_point: int = 0,
    ) -> None: ...

def isa() -> dict[str, Any]: ...
def microkernel_name(max_code: int, m: int) -> str: ...
def use_isa(name: str, emulated: bool = False) -> None: ...
def packed_bytes(n: int, k: int) -> int: ...
def pack_weight(weight: int, scale: int, bias: int, n: int, k: int, out: int) -> None: ...
def unpack_weight(packed: int, n: int, k: int, weight: int, scale: int, bias: int) -> None: ...
def linear(
    x: int,
    x_type: DType,
    m: int,
    packed: int,
    n: int,
    k: int,
    quantizer: ActivationQuantizer,
    y: int,
    y_type: DType,
) -> None: ...
def codes_bytes(m: int, k: int) -> int: ...
def quantize_activations(
    x: int,
    x_type: DType,
    m: int,
    k: int,
    quantizer: ActivationQuantizer,
    codes: int,
    scale: int,
    zero_point: int,
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
