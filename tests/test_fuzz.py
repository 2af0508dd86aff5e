"""Damaged plans, calibrations, cost caches and study files: refused in one line, or right.

SQ_CPU_FUZZ=10000 tries that many of each; the seed is in the test's name.
"""

from __future__ import annotations

import copy
import json
import random
import sqlite3
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from mutating import fuzz_seeds, mutated_bytes, mutated_json, mutated_safetensors, refused
from tiny import batches, mixed_plan, tiny_model
from tuning_cases import QUICK, Divergence, costs

import sq_cpu
from sq_cpu import Calibration, Scheme, SmoothPlan
from sq_cpu.autotuning import latency, processes

GOAL = 6e-5
SCHEME = Scheme.of("O3", symmetric=False)
# A test of its own for each seed would take longer than what it tests.
_PACK = 100


def packs(few: int) -> list[Any]:
    """Return the seeds, some for each test."""
    seeds = fuzz_seeds(few)
    starts = range(0, len(seeds), _PACK)
    return [pytest.param(seeds[n : n + _PACK], id=f"seeds {n} and on") for n in starts]


def each(seeds: list[int], check: Callable[[int], object]) -> None:
    failed = {}
    for seed in seeds:
        try:
            check(seed)
        except Exception as error:
            failed[seed] = "".join(traceback.format_exception(error)[-3:])
    assert not failed, "\n".join(f"seed {seed}: {error}" for seed, error in failed.items())


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def calibration(model: Any) -> Calibration:
    return sq_cpu.calibrate(model, batches(), gradient_rows=4, progress=False)


@pytest.mark.parametrize("seeds", packs(300))
def test_plans(model: Any, calibration: Calibration, tmp_path: Path, seeds: list[int]) -> None:
    text = mixed_plan(model, calibration, SCHEME).to_json()
    path = tmp_path / "plan.json"

    def check(seed: int) -> None:
        if seed % 4:
            path.write_text(mutated_json(text, seed))
        else:
            path.write_bytes(mutated_bytes(text.encode(), seed))

        def carried_out() -> None:
            plan = SmoothPlan.load(path)
            assert SmoothPlan.from_json(plan.to_json()) == plan
            made = sq_cpu.quantize(copy.deepcopy(model), calibration, plan)
            assert made(batches(1)[0]).logits.isfinite().all()

        refused(carried_out, path.stat().st_size)

    each(seeds, check)


@pytest.mark.parametrize("seeds", packs(300))
def test_calibrations(
    model: Any, calibration: Calibration, tmp_path: Path, seeds: list[int]
) -> None:
    path = tmp_path / "calibration"
    data = calibration.save(path).read_bytes()

    def check(seed: int) -> None:
        path.write_bytes(mutated_safetensors(data, seed))

        def used() -> None:
            found = Calibration.load(path)
            sq_cpu.quantize(copy.deepcopy(model), found, scheme="O3")
            if seed % 10 == 0:  # it takes a second
                sq_cpu.tune(model, found, scheme="O3", outliers=0, progress=False)

        refused(used, path.stat().st_size)

    each(seeds, check)


@pytest.mark.parametrize("seeds", packs(300))
def test_cost_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: list[int]) -> None:
    row = dict.fromkeys(latency._VARIANTS, 1.0)
    monkeypatch.setattr(latency, "_measure", lambda *_: dict(row))
    path = tmp_path / "costs.json"
    linears = [torch.nn.Linear(32, 48), torch.nn.Linear(48, 32)]

    def measured() -> None:
        found = latency.measured_costs(linears, tokens=8, dtype=torch.float32, cache=path)
        assert found.of(linears) > 0

    measured()
    text = path.read_text()
    assert json.loads(text)["costs"]

    def check(seed: int) -> None:
        if seed % 4:
            path.write_text(mutated_json(text, seed))
        else:
            path.write_bytes(mutated_bytes(text.encode(), seed))
        # What is damaged is measured again: a cache is never in the way.
        assert refused(measured, path.stat().st_size) is None

    each(seeds, check)


@pytest.fixture(scope="module")
def study(model: Any, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("study") / "study.db"
    _resumed(model, calibration, path)
    return path.read_bytes()


def _resumed(model: Any, calibration: Calibration, path: Path) -> None:
    evaluate = Divergence(model)
    options: dict[str, Any] = {"space": QUICK, "costs": costs(model), "progress": False}
    sq_cpu.autotune(
        model, calibration, evaluate, GOAL, storage=path, trials=2, refine_trials=1, **options
    )


@pytest.mark.parametrize("seeds", packs(200))
def test_study_files(
    model: Any,
    calibration: Calibration,
    study: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seeds: list[int],
) -> None:
    monkeypatch.setattr(processes, "GRACE", 1)
    monkeypatch.setattr(processes, "HEARTBEAT", 1)
    path = tmp_path / "study.db"

    def check(seed: int) -> None:
        path.unlink(missing_ok=True)
        if seed % 4 == 0:
            path.write_bytes(mutated_bytes(study, seed))
        else:
            path.write_bytes(study)
            _change_a_cell(path, random.Random(seed))
        refused(lambda: _resumed(model, calibration, path), path.stat().st_size)

    each(seeds, check)


def _change_a_cell(path: Path, chance: random.Random) -> None:
    """Change a value of some table of a SQLite file, or remove a row; JSON stays JSON, mostly."""
    with closing(sqlite3.connect(path)) as database, database:
        tables = [
            name
            for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        rows: list[Any] = []
        while not rows:
            table = chance.choice(
                [name for name in tables if not name.startswith(("ix_", "sqlite"))]
            )
            found = database.execute(f"SELECT rowid, * FROM {table}")
            names = [column[0] for column in found.description]
            rows = found.fetchall()
        row = chance.choice(rows)
        index = chance.randrange(1, len(names))
        if chance.random() < 0.1:
            database.execute(f"DELETE FROM {table} WHERE rowid = ?", (row[0],))
            return
        value = row[index]
        new: Any = chance.choice((None, "", 0, -1, 1 << 40, 1.5, "x", b"\xff\xfe", "[" * 5000))
        if isinstance(value, str) and value[:1] in "{[" and chance.random() < 0.9:
            new = mutated_json(value, chance.randrange(1 << 30))
        with suppress(sqlite3.IntegrityError):
            database.execute(
                f"UPDATE {table} SET {names[index]} = ? WHERE rowid = ?", (new, row[0])
            )
