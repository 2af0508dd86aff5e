"""Storages that can be opened, and those that cannot."""

from pathlib import Path
from typing import Any

import optuna
import pytest

from sq_cpu import SqCpuError
from sq_cpu.autotuning import storage as storages
from sq_cpu.autotuning.storage import has_study, opened_storage, quiet_optuna


def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    def message(where: str | Path) -> str:
        with pytest.raises(SqCpuError) as caught, opened_storage(where):
            pass
        return str(caught.value)

    missing = message(tmp_path / "none" / "study.db")
    assert missing.startswith("cannot open the storage sqlite:///")
    assert "\n" not in missing
    unreachable = message("postgresql://me:secret@127.0.0.1:1/none")
    assert unreachable.startswith(
        "cannot open the storage postgresql+psycopg://me@127.0.0.1:1/none"
    )
    assert "secret" not in unreachable
    assert message("mysql://host/name").startswith("no driver for the storage mysql://host/name")


def test_a_worker_that_loses_the_race_for_the_tables_opens_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_for_good = storages._Storage
    lost = ["table studies already exists", "UNIQUE constraint failed: alembic_version"]

    def race(*arguments: Any, **options: Any) -> Any:
        if lost:
            raise RuntimeError(lost.pop())
        return open_for_good(*arguments, **options)

    monkeypatch.setattr(storages, "_Storage", race)
    monkeypatch.setattr(storages.time, "sleep", lambda _: None)
    with opened_storage(tmp_path / "study.db") as storage:
        assert not has_study(storage, "test")
    assert not lost


def test_optuna_is_as_loud_afterwards_as_before() -> None:
    before = optuna.logging.get_verbosity()
    with quiet_optuna():
        assert optuna.logging.get_verbosity() == optuna.logging.ERROR
    assert optuna.logging.get_verbosity() == before
