"""The C++ library (cpp/include/sq_cpu), as functions of contiguous CPU tensors.

Each function checks the dtype and size of every tensor against the others, and raises `SqCpuError`.
None takes keywords, as a layer's call must be short.
"""

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
        terms: int = 1,
        hadamard: int = 0,
        dynamic_fallback: bool = False,
    ) -> None: ...
    def row_counts(self, reset: bool = False) -> tuple[int, int, int, int]: ...
    @property
    def hadamard(self) -> int: ...
    @property
    def max_code(self) -> int: ...
    @property
    def terms(self) -> int: ...

class BatchedType(_Enum):
    float32: ClassVar[BatchedType]
    bfloat16: ClassVar[BatchedType]
    float16: ClassVar[BatchedType]
    int32: ClassVar[BatchedType]
    int8: ClassVar[BatchedType]

class KvType(_Enum):
    int8: ClassVar[KvType]
    bfloat16: ClassVar[KvType]

class NormKind(_Enum):
    rms: ClassVar[NormKind]
    layer: ClassVar[NormKind]

_Norm = tuple[NormKind, Tensor | None, Tensor | None, float]

# cpp/include/sq_cpu/program.h; buffers are numbers that buffer() gave. It keeps its tensors.
class Program:
    def __init__(self) -> None: ...
    def buffer(self, width: int) -> int: ...
    def embed(self, table: Tensor, multiplier: float, out: int) -> None: ...
    # Rows of a packed weight [n, k], times the quantizer's 1 / s.
    def embed_packed(
        self,
        packed: Tensor,
        n: int,
        k: int,
        quantizer: ActivationQuantizer,
        multiplier: float,
        out: int,
    ) -> None: ...
    def position(self, table: Tensor, offset: int, out: int) -> None: ...
    # linears: a packed weight and None, or one in float and its bias; n, k, out, column,
    # activation, other, accumulate, columns, column weight, multiplier, softcap. No quantizer: all
    # in float.
    def project(
        self,
        in_buffer: int,
        column: int,
        norm: _Norm | None,
        quantizer: ActivationQuantizer | None,
        kept_rows: bool,
        linears: Sequence[tuple[Any, ...]],
        row_list: int,
        gather: bool,
    ) -> None: ...
    def route(
        self,
        in_buffer: int,
        norm: _Norm | None,
        weight: Tensor,
        top: int,
        renormalize: bool,
        zero: int,
    ) -> None: ...
    def add(self, in_buffer: int, row_list: int, gate: int, out: int) -> None: ...
    def attend(
        self,
        in_buffer: int,
        q: int,
        k: int,
        v: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        q_norm: _Norm | None,
        k_norm: _Norm | None,
        rotary: int,
        cache: int,
        scale: float,
        window: int,
        softcap: float,
        slopes: Tensor | None,
        sinks: Tensor | None,
        out: int,
        stride: int,
    ) -> None: ...
    def merge(self, in_buffer: int, norm: _Norm, out: int) -> None: ...
    def norm(self, buffer: int, column: int, columns: int, norm: _Norm) -> None: ...
    def result(self, buffer: int) -> None: ...
    # Pages, size of a head, their type, number of the page table of a call.
    def set_caches(self, caches: Sequence[tuple[Tensor, int, KvType, int]]) -> None: ...
    # Tables [positions, 2, channels], and whether pairs are interleaved.
    def set_rotaries(self, rotaries: Sequence[tuple[Tensor, bool]]) -> None: ...
    # table: int32 [tables, sequences, pages]; result: fp32 [kept, width].
    def run(
        self,
        ids: Tensor,
        positions: Tensor,
        first_row: Tensor,
        length: Tensor,
        table: Tensor,
        kept: Tensor,
        result: Tensor,
        threads: int,
    ) -> None: ...

# cpp/torch_ops.cc; done once.
def add_torch_operators() -> None: ...

# Blind to torch.compile's tracer; see ops.is_plain.
def is_plain(x: object, /) -> bool: ...
def isa() -> dict[str, Any]: ...
def microkernel_name(max_code: int, m: int, /) -> str: ...

# emulated: the caller has an emulator in place; without, its instructions end the process.
def use_isa(name: str, emulated: bool, /) -> None: ...
def packed_bytes(n: int, k: int, /) -> int: ...
def codes_bytes(m: int, k: int, /) -> int: ...

# Of weight [n, k], scale and bias [n]; out holds packed_bytes(n, k).
def pack_weight(weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor, /) -> None: ...
def unpack_weight(
    packed: Tensor,
    n: int,
    k: int,
    weight: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    /,
) -> None: ...

# Of logits fp32 [rows, vocabulary], which the edits change; temperature, top_p, min_p fp32 [rows];
# top_k, stream, position, ids int64 [rows]. An edit is (ids int64, divisors, addends fp32) [edits];
# an entry of allowed int32 [vocabulary / 32].
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    stream: Tensor,
    position: Tensor,
    edits: list[tuple[Tensor, Tensor, Tensor] | None] | None,
    allowed: list[Tensor | None] | None,
    ids: Tensor,
    /,
) -> None: ...

# Of inverse_smoothing fp32 [k], ids int64 [...]; y [..., k].
def gather_rows(
    packed: Tensor,
    n: int,
    k: int,
    inverse_smoothing: Tensor | None,
    ids: Tensor,
    y: Tensor,
    /,
) -> None: ...

# Of x [..., k]; y, other and residual [..., n] are of its dtype.
def linear(
    x: Tensor,
    packed: Tensor,
    n: int,
    k: int,
    quantizer: ActivationQuantizer,
    y: Tensor,
    activation: Activation,
    other: Tensor | None,
    residual: Tensor | None,
    /,
) -> None: ...

# None for a call that ops.linear must prepare or refuse, or torch sees.
def linear_tensor(
    x: object,
    packed: Tensor,
    in_features: int,
    out_features: int,
    quantizer: ActivationQuantizer,
    /,
) -> Tensor | None: ...
def quantize_activations(
    x: Tensor,
    k: int,
    quantizer: ActivationQuantizer,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    /,
) -> None: ...

# Of as many rows of codes as zero_point has elements; each `terms` add up to one of y.
def linear_quantized(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    max_code: int,
    terms: int,
    packed: Tensor,
    n: int,
    k: int,
    y: Tensor,
    activation: Activation,
    other: Tensor | None,
    residual: Tensor | None,
    /,
) -> None: ...
def linear_requantized(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    max_code: int,
    terms: int,
    packed: Tensor,
    n: int,
    k: int,
    y_quantizer: ActivationQuantizer,
    y_codes: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    operand_type: DType,
    activation: Activation,
    other: Tensor | None,
    residual: Tensor | None,
    /,
) -> None: ...
def gemm(
    codes: Tensor,
    zero_point: Tensor,
    max_code: int,
    packed: Tensor,
    n: int,
    k: int,
    y: Tensor,
    /,
) -> None: ...
def count_saturation(
    codes: Tensor,
    zero_point: Tensor,
    max_code: int,
    packed: Tensor,
    n: int,
    k: int,
    /,
) -> tuple[int, int]: ...

# Of a [batch, heads, m, k] and b [batch, kv_heads, n, k] or, not transposed, [..., k, n]; strides
# are the tensors'.
def batched_matmul(
    a: Tensor,
    b: Tensor,
    transposed: bool,
    alpha: float,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    y: Tensor,
    y_type: BatchedType,
    /,
) -> None: ...

PAGE_TOKENS: int

def page_bytes(head_dim: int, kind: KvType, /) -> int: ...

# Of pages uint8 [pages, kv_heads, page_bytes], first_row int64 [sequences + 1], length int64
# [sequences], table int32 [sequences, pages of one]; k, v, q, y [rows, heads, head_dim].
def append(
    pages: Tensor,
    head_dim: int,
    kind: KvType,
    first_row: Tensor,
    length: Tensor,
    table: Tensor,
    k: Tensor,
    v: Tensor,
    /,
) -> None: ...
def attention(
    pages: Tensor,
    head_dim: int,
    kind: KvType,
    first_row: Tensor,
    length: Tensor,
    table: Tensor,
    q: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    slopes: Tensor | None,
    sinks: Tensor | None,
    y: Tensor,
    /,
) -> None: ...
