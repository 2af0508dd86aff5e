"""Hostile calls of `_core.Program`: each is refused, or the program runs as it did.

A call is a good one of which one or two arguments are replaced. Python's own TypeError is what an
argument of another type gets: the class is private, and `inference.program` its only caller.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch

from sq_cpu import SqCpuError
from sq_cpu.kernels import _core
from sq_cpu.kernels.paged_attention import BatchRows, KvPages
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.scheme import Scheme

CASES = int(os.environ.get("SQ_CPU_HOSTILE_CASES", "150"))
WIDTH, HEAD, VOCABULARY = 32, 16, 10


def linear(rows: int, columns: int) -> QuantLinear:
    torch.manual_seed(rows)
    layer = torch.nn.Linear(columns, rows, bias=False)
    return QuantLinear.from_float(layer, Scheme(reduce_range=False))


QKV, OUT = linear(3 * WIDTH, WIDTH), linear(WIDTH, WIDTH)
TABLE = torch.linspace(-1, 1, VOCABULARY * WIDTH).view(VOCABULARY, WIDTH)
FLOATS = torch.linspace(-0.2, 0.2, WIDTH * WIDTH).view(WIDTH, WIDTH).bfloat16()
POSITIONS = torch.linspace(-1, 1, 9 * WIDTH).view(9, WIDTH)
NORM = (_core.NormKind.rms, torch.ones(WIDTH), None, 1e-5)
ROTARY = torch.ones(8, 2, HEAD)
QUANTIZER: Any = QKV._quantizer


def of(layer: QuantLinear, out: int, accumulate: bool = False) -> tuple[Any, ...]:
    sizes = (layer.packed, None, layer.out_features, layer.in_features)
    return (*sizes, out, 0, _core.Activation.none, -1, accumulate, None, None, 0.5, 0.0)


def in_float(out: int, accumulate: bool = False) -> tuple[Any, ...]:
    sizes = (FLOATS, torch.ones(WIDTH), WIDTH, WIDTH)
    return (*sizes, out, 0, _core.Activation.silu, -1, accumulate, None, None, 1.0, 3.0)


def calls() -> list[tuple[str, tuple[Any, ...]]]:
    """Return the calls that make and run a program, whose buffers are 0 to 4."""
    rows = BatchRows([3], [3], [[1]]).tensors
    pages = KvPages(2, 2, HEAD).tensor
    attend = (1, 0, 16, 32, 2, 2, HEAD, None, None, 0, 0, 0.25, 0, 0.0, None, None, 2, 3 * HEAD)
    ids = torch.tensor([1, 2, 3])
    return [
        ("buffer", (WIDTH,)),
        ("buffer", (3 * WIDTH,)),
        *[("buffer", (WIDTH,))] * 3,
        ("embed", (TABLE, 1.0, 0)),
        ("position", (POSITIONS, 2, 0)),
        ("norm", (0, 0, WIDTH, NORM)),
        ("project", (0, 0, NORM, QUANTIZER, False, [of(QKV, 1)], -1, False)),
        ("attend", attend),
        ("project", (2, 0, None, OUT._quantizer, False, [of(OUT, 0, accumulate=True)], -1, False)),
        ("merge", (2, NORM, 0)),
        ("project", (0, 0, NORM, None, False, [in_float(2)], -1, False)),
        ("project", (2, 0, None, None, False, [in_float(0, accumulate=True)], -1, False)),
        ("route", (0, NORM, TABLE[:2], 1, True, 2)),
        ("project", (0, 0, NORM, OUT._quantizer, False, [of(OUT, 3)], 1, True)),
        ("project", (3, 0, NORM, None, False, [in_float(4)], 1, False)),
        ("add", (4, 1, -1, 2)),
        ("add", (2, -1, 3, 0)),
        ("result", (0,)),
        ("set_caches", ([(pages, HEAD, _core.KvType.int8, 0)],)),
        ("set_rotaries", ([(ROTARY, False)],)),
        (
            "run",
            (
                ids,
                torch.arange(3),
                *rows[:2],
                rows[2][None],
                torch.arange(3),
                torch.empty(3, 32),
                0,
            ),
        ),
    ]


def made(given: list[tuple[str, tuple[Any, ...]]]) -> torch.Tensor:
    program = _core.Program()
    for name, arguments in given:
        getattr(program, name)(*arguments)
    return given[-1][1][6].clone()


def hostile(value: Any, rng: random.Random) -> Any:
    """Return something else of the same kind, or of another."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([-(2**63), -1, 0, 1, 15, 33, 2**31, 2**62, 2**63 - 1, 2**70])
    if isinstance(value, float):
        return rng.choice([float("nan"), float("inf"), -1.0, 1e38, 1e300])
    if isinstance(value, torch.Tensor):
        changes = [
            lambda x: x[:-1],
            lambda x: x[..., :1],
            lambda x: x.double(),
            lambda x: x.to("meta"),
            lambda x: torch.cat((x, x)),
            lambda x: x.T if x.dim() == 2 else x[None],
            lambda x: x.new_full(x.shape, -1) if x.dtype != torch.uint8 else x[:0],
            lambda x: x.new_full(x.shape, 2**30) if x.dtype != torch.uint8 else x[1:],
        ]
        return rng.choice(changes)(value)
    if isinstance(value, tuple | list):
        items = list(value)
        if items:
            at = rng.randrange(len(items))
            items[at] = hostile(items[at], rng)
        return type(value)(items) if rng.random() < 0.9 else type(value)(items[:-1])
    return rng.choice([None, "x", 7, object()])


def test_the_good_calls() -> None:
    first, again = made(calls()), made(calls())
    assert torch.equal(first, again)
    assert first.isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_hostile_calls(seed: int) -> None:
    expected = made(calls())
    refused = lines = 0
    for case in range(CASES):
        rng = random.Random(f"{seed} {case}")
        given = calls()
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(given))
            name, arguments = given[at]
            arguments = tuple(arguments)
            index = rng.randrange(len(arguments))
            changed = (*arguments[:index], hostile(arguments[index], rng), *arguments[index + 1 :])
            given[at] = (name, changed)
        try:
            made(given)
        except (TypeError, MemoryError):
            refused += 1
        except SqCpuError as error:
            lines += str(error).count("\n")
            refused += 1
    assert refused > CASES // 3
    assert lines == 0
    assert torch.equal(made(calls()), expected)


def test_tensors_of_a_program_are_kept() -> None:
    """Nothing but the program holds what its stages point to."""
    given = calls()
    program = _core.Program()
    copies: list[Any] = []
    for name, arguments in given[:-1]:
        arguments = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments)
        getattr(program, name)(*arguments)
    del arguments
    copies.extend(torch.full((VOCABULARY, WIDTH), torch.nan) for _ in range(8))
    program.run(*given[-1][1])
    assert torch.equal(given[-1][1][6], made(calls()))
