"""What a linear costs here: measured once, kept for the machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batches
from torch import nn
from tuning_cases import planted

import sq_cpu
from sq_cpu import Scheme, SqCpuError
from sq_cpu.autotuning import latency
from sq_cpu.autotuning.latency import PRECISIONS, Costs, cache_file, machine, measured_costs
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.linear import QuantLinear


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(latency, "_ROUNDS", 1)
    monkeypatch.setattr(latency, "_FLUSHED_BYTES", 1 << 10)
    return cache_file()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured from now on."""
    seen: list[str] = []
    measure = latency._measure

    def noting(like: Any, tokens: int, dtype: torch.dtype) -> dict[str, float]:
        seen.append(f"{like.out_features}x{like.in_features}, {tokens}, {dtype}")
        return measure(like, tokens, dtype)

    monkeypatch.setattr(latency, "_measure", noting)
    return seen


def linears() -> list[nn.Module]:
    return [nn.Linear(32, 48), nn.Linear(48, 32, bias=False), nn.Linear(32, 48)]


def test_each_shape_is_measured_once_for_a_machine(cache: Path, measured: list[str]) -> None:
    first = measured_costs(linears(), tokens=8)
    assert measured == ["48x32, 8, torch.float32", "32x48, 8, torch.float32"]
    again = measured_costs([*linears(), nn.Linear(64, 16)], tokens=8)
    assert measured[2:] == ["16x64, 8, torch.float32"]
    assert again.entries.items() >= first.entries.items()
    measured_costs(linears()[:1], tokens=1)
    measured_costs(linears()[:1], tokens=8, dtype=torch.bfloat16)
    assert measured[3:] == ["48x32, 1, torch.float32", "48x32, 8, torch.bfloat16"]
    assert measured_costs(linears(), tokens=8).entries == first.entries
    assert len(measured) == 5
    assert json.loads(cache.read_text())["machine"] == machine()
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_every_choice_has_a_price(cache: Path) -> None:
    table = measured_costs(linears(), tokens=8)
    for linear in linears():
        for precision in PRECISIONS:
            assert table.milliseconds(linear, precision) > 0
            if precision != "float":
                assert table.milliseconds(linear, precision, smoothed=True) > 0
                assert table.milliseconds(linear, precision, rotated=True) > 0
                assert table.milliseconds(linear, precision, smoothed=True, rotated=True) > 0
    with pytest.raises(SqCpuError, match="no linear of 5x7, static"):
        table.milliseconds(nn.Linear(7, 5), "static")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"costs": 3}', '{"costs": {"float32": []}}'])
def test_a_damaged_cache_is_measured_again(cache: Path, measured: list[str], damage: str) -> None:
    cache.parent.mkdir()
    cache.write_text(damage)
    first = measured_costs(linears(), tokens=8)
    assert len(measured) == 2
    assert measured_costs(linears(), tokens=8).entries == first.entries
    assert len(measured) == 2


def test_a_row_that_lacks_something_is_measured_again(cache: Path, measured: list[str]) -> None:
    measured_costs(linears(), tokens=8)
    content = json.loads(cache.read_text())
    rows = content["costs"]["float32"]["8"]
    del rows["48x32"]["static"]
    rows["32x48"]["float"] = float("nan")
    cache.write_text(json.dumps(content))
    del measured[:]
    measured_costs(linears(), tokens=8)
    assert len(measured) == 2


def test_the_file_is_that_of_the_machine_class(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache.is_relative_to(tmp_path / "sq_cpu")
    here = machine()
    assert here.keys() == {"cpu", "isa", "threads", "torch", "sq_cpu"}
    monkeypatch.setattr(latency, "machine", lambda: here | {"threads": 1000})
    assert cache_file() != cache
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_file().parent == tmp_path / "home" / ".cache" / "sq_cpu"


def test_a_cache_that_cannot_be_written_is_named(cache: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(SqCpuError, match="set XDG_CACHE_HOME"):
        measured_costs(linears(), tokens=8, cache=blocked / "costs.json")


def test_the_latency_of_a_model_is_the_sum_of_its_linears() -> None:
    row = {"static": 1.0, "per_token": 2.0, "per_tensor": 4.0, "per_token_x2": 16.0, "float": 64.0}
    row |= {
        f"{precision}{extra}": row[precision] + more
        for precision in PRECISIONS
        if precision != "float"
        for extra, more in (("+smoothing", 8), ("+hadamard", 128), ("+smoothing+hadamard", 256))
    }
    table = Costs(tokens=1, dtype="float32", entries={"48x32": row})
    linear = nn.Linear(32, 48)
    layers = [
        linear,
        QuantLinear.from_float(linear, Scheme.of("O1")),
        QuantLinear.from_float(linear, Scheme.of("O3"), (-1.0, 1.0)),
        QuantLinear.from_float(linear, Scheme.of("O2"), smoothing=torch.ones(32)),
        DecomposedLinear.from_float(linear, Scheme.of("O2"), torch.tensor([3])),
        QuantLinear.from_float(linear, Scheme.of("O1"), hadamard=64),
        QuantLinear.from_float(linear, Scheme.of("O1"), smoothing=torch.ones(32), hadamard=64),
    ]
    assert table.of(layers) == 64 + 2 + 1 + 12 + 12 + 130 + 258


def test_a_table_is_its_own_json() -> None:
    row = dict.fromkeys(PRECISIONS, 1.0)
    table = Costs(tokens=1, dtype="bfloat16", entries={"48x32": row})
    again = Costs.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again.to_dict() == table.to_dict()
    with pytest.raises(SqCpuError, match="the cost table lacks dtype"):
        Costs.from_dict({"tokens": 1})


def test_what_cannot_be_measured_is_refused(cache: Path) -> None:
    with pytest.raises(SqCpuError, match="tokens is 0, not a whole number >= 1"):
        measured_costs(linears(), tokens=0)
    with pytest.raises(SqCpuError, match="fp32, bf16 or fp16"):
        measured_costs(linears(), dtype=torch.float64)


def test_autotune_measures_the_shapes_of_its_model(cache: Path, measured: list[str]) -> None:
    model = planted("llama", num_hidden_layers=1)
    found = sq_cpu.autotune(
        model,
        batches(3),
        lambda candidate: 1.0 + (candidate is not model),
        10.0,
        trials=1,
        refine_trials=0,
        tokens=4,
        progress=False,
    )
    assert found.goal_met
    assert set(measured) == {
        f"{linear.out_features}x{linear.in_features}, 4, torch.float32"
        for name, linear in model.named_modules()
        if isinstance(linear, nn.Linear) and name != "lm_head"
    }
