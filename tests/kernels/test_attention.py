"""int8 attention products: the kernels against plain torch, and against a real layer in fp32."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sq_cpu import SqCpuError, texts
from sq_cpu.evaluation.perplexity import token_windows
from sq_cpu.kernels.attention import matmul_pv, matmul_qk, matmul_reference
from sq_cpu.kernels.torch_ops import RESULT_TYPES

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def codes(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    return torch.randint(low, high, shape, dtype=dtype)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 33])
def test_the_kernels_give_the_reference_bit_for_bit(
    each_isa: str, head_dim: int, out_dtype: torch.dtype
) -> None:
    scaled = out_dtype != torch.int32
    for group, queries, keys in ((1, 17, 33), (3, 1, 100), (8, 2, 15), (2, 0, 5), (2, 5, 0)):
        heads = 2 * group
        q, k = codes(2, heads, queries, head_dim), codes(2, 2, keys, head_dim)
        p, v = codes(2, heads, queries, keys, dtype=torch.uint8), codes(2, 2, keys, head_dim)
        row = torch.rand(2, heads, queries) if scaled else None
        key = torch.rand(2, 2, keys) if scaled else None
        channel = torch.rand(2, 2, head_dim) if scaled else None
        scale = 1 / 512 if scaled else 1.0
        got = matmul_qk(q, k, scale, q_scale=row, k_scale=key, out_dtype=out_dtype)
        assert torch.equal(got, matmul_reference(q, k, True, scale, row, key, out_dtype))
        assert got.shape == (2, heads, queries, keys)
        got = matmul_pv(p, v, scale, p_scale=row, v_scale=channel, out_dtype=out_dtype)
        assert torch.equal(got, matmul_reference(p, v, False, scale, row, channel, out_dtype))
        assert got.shape == (2, heads, queries, head_dim)


def test_the_reference_on_numbers_done_by_hand() -> None:
    q = torch.tensor([[[[1, -2, 3]], [[4, 5, -6]]]], dtype=torch.int8)  # two heads, one query
    k = torch.tensor([[[[7, 8, 9], [-1, -128, 127]]]], dtype=torch.int8)  # one kv head, two keys
    sums = [[[18, 636]], [[14, -1406]]]
    for multiply in (partial(matmul_qk, q, k), partial(matmul_reference, q, k, True)):
        assert multiply(out_dtype=torch.int32)[0].tolist() == sums
    halves = matmul_qk(q, k, 0.25, out_dtype=torch.int8)  # 4.5 and 3.5 go to 4, 159 to 127
    assert halves[0].tolist() == [[[4, 127]], [[4, -127]]]
    q_scale, k_scale = torch.tensor([[[2.0], [3.0]]]), torch.tensor([[[5.0, 0.5]]])
    scaled = matmul_qk(q, k, 0.5, q_scale=q_scale, k_scale=k_scale)
    assert scaled[0].tolist() == [[[90.0, 318.0]], [[105.0, -1054.5]]]
    p = torch.tensor([[[[255, 1]], [[0, 2]]]], dtype=torch.uint8)
    assert matmul_pv(p, k, out_dtype=torch.int32)[0].tolist() == [
        [[1784, 1912, 2422]],
        [[-2, -256, 254]],
    ]


def test_views_of_any_strides_need_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    q = codes(2, 9, 6, 40).transpose(1, 2)  # as transformers makes them: [B, L, H, D], transposed
    k = codes(2, 11, 3, 40).transpose(1, 2)
    v = codes(1, 3, 11, 80).expand(2, 3, 11, 80)[..., 40:]
    p = codes(2, 6, 9, 30, dtype=torch.uint8)[..., :11]
    monkeypatch.setattr(Tensor, "contiguous", lambda *_: pytest.fail("copied"))
    scores, output = matmul_qk(q, k, 0.01), matmul_pv(p, v, 0.01)
    monkeypatch.undo()
    assert torch.equal(scores, matmul_reference(q, k, True, 0.01))
    assert torch.equal(output, matmul_reference(p, v, False, 0.01))
    columns_apart = codes(2, 3, 40, 11).mT
    expected = matmul_reference(q, columns_apart, True, 0.01)
    assert torch.equal(matmul_qk(q, columns_apart, 0.01), expected)


def test_any_number_of_threads_gives_the_same_bits(threads: Callable[[int], None]) -> None:
    q, k = codes(1, 8, 100, 64), codes(1, 2, 300, 64)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(matmul_qk(q, k, 0.01))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_nan_scale_stays_in_its_row() -> None:
    q, k, q_scale = codes(1, 2, 5, 64), codes(1, 2, 7, 64), torch.ones(1, 2, 5)
    q_scale[0, 1, 3] = math.nan
    nan = matmul_qk(q, k, q_scale=q_scale).isnan()
    assert nan[0, 1, 3].all()
    assert nan.sum() == 7
    int8 = matmul_qk(q, k, 1e-4, q_scale=q_scale, out_dtype=torch.int8)
    assert (int8[0, 1, 3] == -127).all()
    reference = matmul_reference(q, k, True, 1e-4, q_scale, out_dtype=torch.int8)
    assert torch.equal(int8, reference)


def test_bad_input_is_one_clear_line() -> None:
    q, k = codes(1, 4, 5, 64), codes(1, 2, 7, 64)
    p, v = codes(1, 4, 5, 7, dtype=torch.uint8), codes(1, 2, 7, 64)
    bad: list[tuple[Callable[[], Tensor], str]] = [
        (lambda: matmul_qk(q.float(), k), r"torch.float32 by torch.int8 .*; use torch.int8 by"),
        (lambda: matmul_qk(p, k), r"torch.uint8 by torch.int8"),
        (lambda: matmul_qk(q, k, out_dtype=torch.float64), r"to torch.float64; use"),
        (lambda: matmul_qk(q, codes(1, 2, 7, 65)), r"\[1, 4, 5, 64\] by \[1, 2, 7, 65\] do not"),
        (lambda: matmul_qk(q, codes(1, 3, 7, 64)), r"heads a multiple of kv_heads"),
        (lambda: matmul_qk(q, codes(1, 0, 7, 64)), r"heads a multiple of kv_heads"),
        (lambda: matmul_qk(q[0], k[0]), r"do not fit; use \[batch, heads, queries, head_dim\]"),
        (lambda: matmul_pv(p, codes(1, 2, 8, 64)), r"use \[batch, heads, queries, keys\]"),
        (lambda: matmul_qk(q, k, math.inf), r"scale is inf; it must be finite"),
        (lambda: matmul_qk(q, k, 2.0, out_dtype=torch.int32), r"leave the scales out"),
        (lambda: matmul_qk(q, k, q_scale=torch.ones(4, 5)), r"not torch.float32 \[1, 4, 5\]"),
        (lambda: matmul_pv(p, v, v_scale=torch.ones(1, 2, 7)), r"not torch.float32 \[1, 2, 64\]"),
        (lambda: matmul_qk(q.to("meta"), k), r"on meta; sq_cpu runs on the CPU only"),
        (lambda: matmul_qk(codes(1, 1, 1, 65794), codes(1, 1, 1, 65794)), r"65794 products exceed"),
    ]
    for call, message in bad:
        with pytest.raises(SqCpuError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    q_scale = torch.ones(1, 4, 5, requires_grad=True)
    with torch.enable_grad(), pytest.raises(SqCpuError, match=r"torch.no_grad"):
        matmul_qk(q, k, q_scale=q_scale)


def test_torch_compile_and_fake_tensors_see_the_op() -> None:
    q, k = codes(1, 4, 5, 64), codes(1, 2, 7, 64)
    compiled: Any = torch.compile(matmul_qk, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, 0.5), matmul_qk(q, k, 0.5))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = matmul_qk(mode.from_tensor(q), mode.from_tensor(k), out_dtype=torch.bfloat16)
    assert (fake.shape, fake.dtype) == ((1, 4, 5, 7), torch.bfloat16)
    v_scale = torch.rand(1, 2, 64)
    p = codes(1, 4, 5, 7, dtype=torch.uint8)
    arguments = (p, k, False, 0.5, None, v_scale, RESULT_TYPES[torch.float32])
    torch.library.opcheck(torch.ops.sq_cpu.batched_matmul.default, arguments)


def quantized(x: Tensor) -> tuple[Tensor, float]:
    scale = x.abs().max().item() / 127
    return (x / scale).round().to(torch.int8), scale


@pytest.fixture(scope="module")
def qkv(smollm2: Callable[[], tuple[nn.Module, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value states of one layer of SmolLM2, positions rotated in, on a text."""
    model, tokenizer = smollm2()
    model.set_attn_implementation("sdpa")
    taken: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Any:
        taken.append((q, k, v))
        return sdpa_attention_forward(module, q, k, v, *rest, **named)

    window = next(iter(token_windows(tokenizer, texts.evaluation(), window=256, windows=1)))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", take)
        model(window)
    return taken[10]


def test_int8_attention_of_a_real_layer(qkv: tuple[Tensor, Tensor, Tensor], each_isa: str) -> None:
    """Per-tensor int8 q, k, v and u8 probabilities against fp32: 9 heads over 3 kv heads.

    To first order the error is the sum of what rounding each of q, k, P and v does alone in fp32.
    Roundings are independent, so it is the root of the sum of squares of these four; what is left,
    products of two of them, is a few percent of that. In this layer, relative to the output's norm:
    q 0.021, k 0.037, P 0.029 and v 0.018, together 0.055.
    """
    q, k, v = qkv
    _, heads, length, head_dim = q.shape
    assert (heads, k.shape[1], head_dim) == (9, 3, 64)
    mask = torch.full((length, length), -math.inf).triu(1)

    def probabilities(q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.repeat_interleave(3, 1).mT / math.sqrt(head_dim)
        return (scores + mask).softmax(-1)

    def rounded(p: Tensor) -> tuple[Tensor, Tensor]:
        p8 = (p * 255).round()
        return p8.to(torch.uint8), 255 / p8.sum(-1)  # what makes a row's weights add up to 1

    def output(p: Tensor, v: Tensor) -> Tensor:
        return p @ v.repeat_interleave(3, 1)

    p = probabilities(q, k)
    exact = output(p, v)
    (q8, sq), (k8, sk), (v8, sv) = quantized(q), quantized(k), quantized(v)
    codes_of_p, norm = rounded(p)
    alone = {
        "q": output(probabilities(q8 * sq, k), v),
        "k": output(probabilities(q, k8 * sk), v),
        "p": output(codes_of_p / 255 * norm[..., None], v),
        "v": output(p, v8 * sv),
    }
    parts = {name: ((y - exact).norm() / exact.norm()).item() for name, y in alone.items()}

    scale = sq * sk / math.sqrt(head_dim)
    scores8 = matmul_qk(q8, k8, scale)
    assert torch.equal(scores8, matmul_reference(q8, k8, True, scale))
    p8, norm8 = rounded((scores8 + mask).softmax(-1))
    y = matmul_pv(p8, v8, sv / 255, p_scale=norm8)
    assert torch.equal(y, matmul_reference(p8, v8, False, sv / 255, norm8))
    error = ((y - exact).norm() / exact.norm()).item()
    assert error == pytest.approx(math.hypot(*parts.values()), rel=0.05)
    assert error < 0.06
