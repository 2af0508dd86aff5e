"""The linear op and its peers, verified, ready for `harness.interleave`.

Ours is the whole op as a model calls it: bf16 in, per-token quantization, int8 GEMM,
dequantization, bias, bf16 out. The int8 peers get their activations quantized beforehand: oneDNN's
time is that of the GEMM, dequantization and bias, that of torch._int_mm of the GEMM alone.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
import torch.nn.functional as F  # noqa: N812
from harness import MAX_ROUNDS, PLANNING_ROUNDS, Candidate, Stats, TimeRounds, interleave
from machine import beyond_cache, last_level_cache
from results import record
from shapes import Shape
from torch import Tensor, nn

from sq_cpu.kernels import _core
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.numerics.rounding import quantize_weight
from sq_cpu.scheme import Scheme

SUBJECT, INT_MM = "sq_cpu", "torch int_mm"
_SCALE, _ZERO_POINT = 0.02, 128  # of the activations that the int8 peers get
_BYTES = {SUBJECT: 1, "onednn int8": 1, INT_MM: 1, "torch bf16": 2, "torch fp32": 4}  # a weight
_MAX_COPIES = MAX_ROUNDS + PLANNING_ROUNDS  # then a measurement uses no copy twice
_CHECKED_ROWS = 16

# How torch._int_mm's [K, N] operand lies in memory.
_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row-major [N, K], transposed": lambda weight: weight.clone().t(),
    "row-major [K, N]": lambda weight: weight.t().contiguous(),
}


def rotation_bytes(limit_mb: int | None = None) -> int:
    """Bytes of weights that each candidate goes through before it uses a copy again.

    Twice the last-level cache, but all candidates together at most a quarter of the free memory;
    or `limit_mb`.
    """
    if limit_mb is not None:
        return limit_mb << 20
    available: int = psutil.virtual_memory().available
    return min(beyond_cache(), available // (4 * len(_BYTES)))


class LinearOp:
    """One linear's weights in every form, each in as many copies as `rotation` bytes hold.

    `prepare(m)` makes the inputs of M rows and verifies every candidate on them.
    """

    m = 0

    def __init__(self, shape: Shape, rotation: int) -> None:
        n, k = shape
        generator = torch.Generator().manual_seed(0)
        self.shape = shape
        self.weight = torch.randn(n, k, generator=generator) * 0.02
        self.bias = torch.randn(n, generator=generator)
        self.bias16 = self.bias.bfloat16()
        self.int8, self.scale = quantize_weight(self.weight, "per_channel")
        self.weight_zero_points = torch.zeros(n, dtype=torch.int32)
        self.scheme = Scheme.of("O1")

        def candidate(name: str, call: Callable[[int], Tensor]) -> Candidate:
            copy_bytes = n * k * _BYTES[name]
            copies = max(1, min(-(-rotation // copy_bytes), _MAX_COPIES))
            return Candidate(call, copies, copy_bytes)

        calls: dict[str, Callable[[int], Tensor]] = {
            SUBJECT: lambda i: self.layers[i](self.x16),
            "onednn int8": self._onednn,
            INT_MM: lambda i: torch._int_mm(self.s8, self.int_mm[i]),
            "torch bf16": lambda i: F.linear(self.x16, self.bf16[i], self.bias16),
            "torch fp32": lambda i: F.linear(self.x, self.fp32[i], self.bias),
        }
        self._all = {name: candidate(name, call) for name, call in calls.items()}
        self.rotation_mb = sum(c.copies * c.copy_bytes for c in self._all.values()) >> 20

        linear = nn.Linear(k, n)
        linear.load_state_dict({"weight": self.weight, "bias": self.bias})
        state = QuantLinear.from_float(linear.requires_grad_(False), self.scheme).state_dict()
        self.layers = [QuantLinear(k, n, self.scheme, bias=True) for _ in self._copies(SUBJECT)]
        for layer in self.layers:
            layer.load_state_dict(state)
        self.bf16 = [self.weight.bfloat16() for _ in self._copies("torch bf16")]
        self.fp32 = [self.weight.clone() for _ in self._copies("torch fp32")]
        self.onednn: list[Tensor] = []
        self.int_mm: list[Tensor] = []
        self.int_mm_layout = ""

    def _copies(self, name: str) -> range:
        return range(self._all[name].copies)

    def _onednn(self, i: int) -> Tensor:
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            self.u8,
            _SCALE,
            _ZERO_POINT,
            self.onednn[i],
            self.scale,
            self.weight_zero_points,
            self.bias,
            1.0,
            0,
            torch.bfloat16,
            "none",
            [],
            "",
        )
        return result

    def prepare(self, m: int) -> None:
        """Make the inputs of M rows, the peers' weights as they suit M, and verify every call."""
        if m == self.m:
            return
        n, k = self.shape
        self.x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        self.x16 = self.x.bfloat16()
        codes = (self.x / _SCALE).round()
        self.s8 = codes.clamp(-127, 127).to(torch.int8)
        self.u8 = (codes + _ZERO_POINT).clamp(0, 255).to(torch.uint8)
        self.onednn.clear()  # frees memory before more is taken
        # With the shape of x, as torch's own compiler gives it: the layout that suits M.
        self.onednn += [
            torch.ops.onednn.qlinear_prepack(self.int8, [m, k]) for _ in self._copies("onednn int8")
        ]
        self.candidates, self.skipped = dict(self._all), dict[str, str]()
        try:
            self._choose_int_mm_layout()
        except RuntimeError as error:
            self.skipped[INT_MM] = str(error).partition("\n")[0]
            del self.candidates[INT_MM]

        some = torch.linspace(0, m - 1, min(m, _CHECKED_ROWS)).long()  # rows are independent
        references = self._references(some)
        for name, candidate in self.candidates.items():
            for i in {0, candidate.copies - 1}:
                found: Any = candidate.call(i)
                what = f"{name}, N={n} K={k} M={m}, copy {i}"
                _check(what, found[some], references[name], exact=name == INT_MM)
        self.m = m

    def _choose_int_mm_layout(self) -> None:
        """Hold torch._int_mm's weights in the layout that is faster for this M."""
        weights = {name: lay_out(self.int8) for name, lay_out in _LAYOUTS.items()}
        seconds = {name: _quickest(self.s8, weight) for name, weight in weights.items()}
        fastest = min(seconds, key=seconds.__getitem__)
        if fastest != self.int_mm_layout:
            self.int_mm.clear()
            self.int_mm += [_LAYOUTS[fastest](self.int8) for _ in self._copies(INT_MM)]
            self.int_mm_layout = fastest

    def _references(self, some: Tensor) -> dict[str, Tensor]:
        x, x16 = self.x[some], self.x16[some]
        weight = self.int8.double()
        u8 = (self.u8[some].double() - _ZERO_POINT) * _SCALE
        return {
            SUBJECT: self.layers[0].reference(x16),
            "onednn int8": u8 @ (weight * self.scale[:, None]).T + self.bias,
            INT_MM: self.s8[some].double() @ weight.T,  # exact: integers below 2^53
            "torch bf16": F.linear(
                x16.float(), self.weight.bfloat16().float(), self.bias16.float()
            ),
            "torch fp32": F.linear(x.double(), self.weight.double(), self.bias.double()),
        }


def _quickest(s8: Tensor, weight: Tensor) -> float:
    torch._int_mm(s8, weight)  # plans and allocates
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        torch._int_mm(s8, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _check(what: str, found: Tensor, expected: Tensor, *, exact: bool) -> None:
    """Require equality to bf16 rounding: half an ulp is 2^-9 of a value, twice that is allowed."""
    error = (found.double() - expected.double()).abs().max()
    limit = 0.0 if exact else 2.0**-8 * expected.double().abs().max()
    if not error <= limit:  # NaN fails too
        raise AssertionError(f"{what}: off by {error:.3g}, allowed {limit:.3g}")


@functools.cache
def _larger_than_cache() -> Tensor:
    return torch.ones(beyond_cache(), dtype=torch.uint8)


def _left_cache(candidates: Mapping[str, Candidate], stats: Mapping[str, Stats]) -> bool:
    """Tell whether every call found its weights outside the cache, emptied before the first one.

    Either no copy was used twice, or more than the cache holds was read between two uses.
    """

    def read_between(name: str) -> float:
        copies, rounds = candidates[name].copies, stats[name].rounds
        if copies >= rounds + PLANNING_ROUNDS:
            return math.inf
        return sum(
            min(other.copies, copies / rounds * stats[other_name].rounds) * other.copy_bytes
            for other_name, other in candidates.items()
        )

    return min(map(read_between, candidates)) > last_level_cache()


def measure(
    op: LinearOp, *, threads: int, warm: bool, budget: float, **timer: TimeRounds
) -> dict[str, Any]:
    """Time one configuration of a prepared op and make its row."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if not warm:
            _larger_than_cache().max()  # reads it
        with torch.inference_mode():
            stats = interleave(op.candidates, warm=warm, budget=budget, **timer)
    finally:
        torch.set_num_threads(before)
    (n, k), m = op.shape, op.m
    cold = "cold" if _left_cache(op.candidates, stats) else "rotated, within the cache"
    facts = {
        "n": n,
        "k": k,
        "layers": op.shape.layers(),
        "m": m,
        "threads": threads,
        "weights": "warm" if warm else cold,
        "rotation_mb": op.rotation_mb,
        "microkernel": _core.microkernel_name(op.scheme.levels, m),
        "int_mm_layout": op.int_mm_layout,
        "skipped": op.skipped,
        "weight_gb_per_s": n * k / stats[SUBJECT].median / 1e9,
    }
    return record(stats, 2.0 * m * n * k, facts)
