"""Hostile calls of every function through which Python reaches the kernels.

Each gives a result or an `SqCpuError` of one line: no crash, no other exception, no memory beyond
what the result takes. A call is a good one of which one to three arguments are replaced by extremes
of their annotated type. The annotations are the functions' own, so one without a row here fails.

SQ_CPU_HOSTILE_CASES is the number of calls of each function. The seed of a call is its number.
"""

from __future__ import annotations

import inspect
import os
import random
import re
import resource
import traceback
from pathlib import Path

import pytest
import torch
from hostile_calls import METHODS, OTHERS, PAGES_METHODS, PLAIN, doors, good
from hostile_values import extreme

import sq_cpu
from sq_cpu import QuantLinear, SqCpuError
from sq_cpu.kernels.paged_attention import KvPages

CASES = int(os.environ.get("SQ_CPU_HOSTILE_CASES", "150"))
PACKAGE = str(Path(sq_cpu.__path__[0]).resolve())
MOST_NEW_BYTES = 1 << 30

DOORS = {name: door for name, door in doors().items() if name not in PLAIN}


def test_every_method_of_the_layer_has_a_row() -> None:
    own = {name for name, f in vars(QuantLinear).items() if inspect.isfunction(f)}
    # from_float, reference and the methods without arguments are plain torch around the others
    plain = {"from_float", "reference", "weight_int8", "weight_float", "extra_repr", "entries"}
    assert {name for name in own if not name.startswith("_")} - plain == set(METHODS)
    assert OTHERS.keys() <= DOORS.keys()


def test_every_method_of_the_pages_has_a_row() -> None:
    own = {name for name, f in vars(KvPages).items() if inspect.isfunction(f)}
    assert {name for name in own if not name.startswith("_")} == set(PAGES_METHODS)


def test_every_function_of_the_cpp_headers_has_a_row() -> None:
    root = Path(__file__).resolve().parents[2]
    declared = {
        name
        for header in (root / "cpp/include/sq_cpu").glob("*.h")
        for name in re.findall(r"^[A-Za-z][\w:<>&* ]*?(\w+)\([^()]*\) *;", header.read_text(), re.M)
    }
    assert {"linear", "gemm", "packed_bytes", "isa_name", "batched_matmul"} <= declared
    rows = re.findall(r'attack\("(\w+)"', (root / "tests/cpp/test_hostile.cc").read_text())
    # Those without parameters cannot be called wrongly.
    assert declared - set(rows) == {"isa_status", "active_isa", "isa_is_forced"}


def check_raised(error: BaseException) -> None:
    """Fail for an exception that is not ours, unless torch refused before it called us."""
    if isinstance(error, SqCpuError):
        assert "\n" not in str(error), f"more than one line: {error}"
        return
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    torch_refused = frames[-1].filename.endswith("_ops.py") and not ours
    assert torch_refused, "".join(traceback.format_exception(error)[-6:])


@pytest.mark.parametrize("name", DOORS)
def test_a_hostile_call_is_refused_or_right(name: str) -> None:
    door, is_core = DOORS[name], name.startswith("_core.")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for seed in range(CASES if door.kinds else 1):
        rng = random.Random(f"{name} {seed}")
        torch.manual_seed(seed)
        base = good() | {key: make() for key, make in OTHERS.get(name, {}).items()}
        arguments = {parameter: base[parameter] for parameter in door.kinds}
        changed = rng.sample(list(arguments), min(len(arguments), rng.choice([1, 1, 2, 3])))
        try:
            with torch.set_grad_enabled(rng.random() < 0.5):
                for key in changed if seed else ():  # the first call is the good one
                    arguments[key] = extreme(door.kinds[key], base[key], rng, is_core=is_core)
                door.call(**arguments)
        except Exception as error:
            refused += 1
            try:
                assert seed > 0, "the good call"
                check_raised(error)
            except AssertionError as failure:
                raise AssertionError(f"seed {seed}, {changed}: {failure}") from error
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
    assert grown < MOST_NEW_BYTES
    assert refused or len(door.kinds) < 2, "no call was hostile"
