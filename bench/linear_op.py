"""The linear op and its peers, verified, ready for `harness.interleave`.

Ours is the whole op as a model calls it: bf16 in, per-token quantization, int8 GEMM,
dequantization, bias, bf16 out. oneDNN's int8 op gets its activations quantized beforehand, so its
time is that of the GEMM, dequantization and bias alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from harness import Call, TimeRounds, interleave, last_level_cache, record
from shapes import Shape
from torch import Tensor, nn

from sq_cpu.linear import QuantLinear, quantize_weight
from sq_cpu.scheme import Scheme

SUBJECT = "sq_cpu"
_PEER_SCALE, _PEER_ZERO_POINT = 0.02, 128
_BYTES = {"sq_cpu": 1, "onednn int8": 1, "torch bf16": 2, "torch fp32": 4}  # of one weight


class LinearOp:
    """One linear's weights in every form, in as many copies as leave the last-level cache."""

    def __init__(self, shape: Shape, rotation: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape = shape
        self.weight = torch.randn(shape.n, shape.k, generator=generator) * 0.02
        self.bias = torch.randn(shape.n, generator=generator)
        self.int8, self.scale = quantize_weight(self.weight, "per_channel")

        one = shape.n * shape.k * sum(_BYTES.values())
        # A copy is used again after every candidate went through all of its own.
        self.copies = max(1, min(-(-rotation // one), 512))
        self.rotation_mb = self.copies * one >> 20
        self.cold = self.copies * one > last_level_cache()

        linear = nn.Linear(shape.k, shape.n)
        linear.load_state_dict({"weight": self.weight, "bias": self.bias})
        layer = QuantLinear.from_float(linear.requires_grad_(False), Scheme.of("O1"))
        self.layers = [layer, *(copy.deepcopy(layer) for _ in range(self.copies - 1))]
        self.fp32 = [self.weight.clone() for _ in range(self.copies)]
        self.bf16 = [self.weight.bfloat16() for _ in range(self.copies)]

    def candidates(self, m: int) -> dict[str, Call]:
        """Give the verified calls for M rows, ours first."""
        n, k = self.shape.n, self.shape.k
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        x16, bias16 = x.bfloat16(), self.bias.bfloat16()
        u8 = (x / _PEER_SCALE).round().add(_PEER_ZERO_POINT).clamp(0, 255).to(torch.uint8)
        zero_points = torch.zeros(n, dtype=torch.int32)
        # With the shape of x, as torch's own compiler gives it: the layout that suits M.
        packed = [torch.ops.onednn.qlinear_prepack(self.int8, [m, k]) for _ in range(self.copies)]
        copies, layers, fp32, bf16 = self.copies, self.layers, self.fp32, self.bf16

        def onednn(i: int) -> Tensor:
            result: Tensor = torch.ops.onednn.qlinear_pointwise(
                u8,
                _PEER_SCALE,
                _PEER_ZERO_POINT,
                packed[i % copies],
                self.scale,
                zero_points,
                self.bias,
                1.0,
                0,
                torch.bfloat16,
                "none",
                [],
                "",
            )
            return result

        calls: dict[str, Call] = {
            "sq_cpu": lambda i: layers[i % copies](x16),
            "onednn int8": onednn,
            "torch bf16": lambda i: F.linear(x16, bf16[i % copies], bias16),
            "torch fp32": lambda i: F.linear(x, fp32[i % copies], self.bias),
        }
        dequantized = self.int8 * self.scale[:, None]
        references = {
            "sq_cpu": layers[0].reference(x16),
            "onednn int8": F.linear(
                (u8.float() - _PEER_ZERO_POINT) * _PEER_SCALE, dequantized, self.bias
            ),
            "torch bf16": F.linear(x16.float(), bf16[0].float(), bias16.float()),
            "torch fp32": F.linear(x.double(), self.weight.double(), self.bias.double()),
        }
        for name, call in calls.items():
            for i in {0, copies - 1}:
                _check(f"{name}, N={n} K={k} M={m}, copy {i}", call(i), references[name])
        return calls


def _check(what: str, found: Any, expected: Tensor) -> None:
    """Require equality to bf16 rounding: half an ulp is 2^-9 of a value, twice that is allowed."""
    error = (found.double() - expected.double()).abs().max()
    limit = 2.0**-8 * expected.double().abs().max()
    if not error <= limit:  # NaN fails too
        raise AssertionError(f"{what}: off by {error:.3g}, allowed {limit:.3g}")


def measure(
    op: LinearOp,
    m: int,
    calls: dict[str, Call],
    *,
    model: str,
    threads: int,
    warm: bool,
    budget: float,
    **timer: TimeRounds,
) -> dict[str, Any]:
    """Time one configuration and make its row."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            stats = interleave(calls, warm=warm, budget=budget, **timer)
    finally:
        torch.set_num_threads(before)
    n, k = op.shape.n, op.shape.k
    weights = "warm" if warm else "cold" if op.cold else "rotated, within the cache"
    return record(
        stats,
        2.0 * m * n * k,
        {
            "model": model,
            "linear": op.shape.linear,
            "n": n,
            "k": k,
            "m": m,
            "threads": threads,
            "weights": weights,
            "rotation_mb": op.rotation_mb,
            "weight_gb_per_s": n * k / stats[SUBJECT].median / 1e9,
        },
    )


def sweep(
    models: dict[str, tuple[Shape, ...]],
    rows: Sequence[int],
    threads: Sequence[int],
    *,
    rotation: int,
    budget: float,
    warm: Sequence[bool] = (False, True),
) -> Iterator[dict[str, Any]]:
    """Yield a row for each model, shape, M, thread count and state of the weights."""
    for model, shapes in models.items():
        for shape in shapes:
            op = LinearOp(shape, rotation)
            for m in rows:
                calls = op.candidates(m)
                for count in threads:
                    for is_warm in warm:
                        yield measure(
                            op,
                            m,
                            calls,
                            model=model,
                            threads=count,
                            warm=is_warm,
                            budget=budget,
                        )
