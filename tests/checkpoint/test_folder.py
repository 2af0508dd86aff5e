"""The work folder: one process at a time, what is in the way, what changes during the work."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import fails

import sq_cpu
from sq_cpu.checkpoint import folder as staging
from sq_cpu.checkpoint.folder import staged
from sq_cpu.checkpoint.load import load
from sq_cpu.checkpoint.save import save, save_staged


def _leave_nothing(root: Path) -> None:
    assert not [path for path in root.rglob("*") if ".partial" in path.name]


def test_the_second_run_on_a_target_is_refused_at_its_start(
    quantized_llama: Any, tmp_path: Path
) -> None:
    with staged(tmp_path / "out") as first:
        fails("another process is at work in", save, quantized_llama, tmp_path / "out")
        (tmp_path / "link").symlink_to("out")
        fails("another process is at work in", save, quantized_llama, tmp_path / "link")
        save_staged(first, quantized_llama)
    load(tmp_path / "out")
    _leave_nothing(tmp_path)


def _fill(out: Path) -> None:
    out.mkdir(exist_ok=True)
    (out / "mine").write_text("x")


def _file(out: Path) -> None:
    out.write_text("mine")


@pytest.mark.parametrize("appears", [_fill, _file])
def test_what_appears_during_the_work_stays(
    quantized_llama: Any, tmp_path: Path, appears: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"

    def work() -> None:
        with staged(out) as made:
            appears(out)
            save_staged(made, quantized_llama)

    fails("was changed during the work", work)
    assert (out / "mine").exists() or out.read_text() == "mine"
    _leave_nothing(tmp_path)


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("change", ["a file in it", "another checkpoint"])
def test_a_checkpoint_that_changes_during_the_work_stays(
    quantized_llama: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exchanges: bool,
    change: str,
) -> None:
    if not exchanges:
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
    out = save(quantized_llama, tmp_path / "out")

    def work() -> None:
        with staged(out) as made:
            if change == "a file in it":
                (out / "mine").write_text("x")
            else:
                out.rename(tmp_path / "moved")
                save(quantized_llama, tmp_path / "other").rename(out)
            save_staged(made, quantized_llama)

    before = out.stat().st_ino
    fails("holds mine" if change == "a file in it" else "was changed during the work", work)
    assert change == "another checkpoint" or out.stat().st_ino == before
    assert change == "another checkpoint" or (out / "mine").exists()
    load(out, verify=False)
    _leave_nothing(tmp_path)


def test_modes_stay(quantized_llama: Any, tmp_path: Path) -> None:
    out = save(quantized_llama, tmp_path / "out")
    out.chmod(0o750)
    (out / "config.json").chmod(0o600)
    save(quantized_llama, out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert stat.S_IMODE((out / "config.json").stat().st_mode) == 0o600
    (tmp_path / "empty").mkdir(mode=0o700)
    save(quantized_llama, tmp_path / "empty")
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o700


def test_what_a_user_made_is_not_cleared(quantized_llama: Any, tmp_path: Path) -> None:
    work = tmp_path / ".out.partial"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    fails("notes.txt is not of sq_cpu's making", save, quantized_llama, tmp_path / "out")
    assert (work / "notes.txt").read_text() == "mine"


def test_what_a_killed_save_left_is_cleared(quantized_llama: Any, tmp_path: Path) -> None:
    for name in ("whole", "old"):
        (tmp_path / ".out.partial" / name).mkdir(parents=True)
        (tmp_path / ".out.partial" / name / "file").write_text("half")
    (tmp_path / ".out.partial" / "lock").touch()
    (tmp_path / "out").mkdir()
    save(quantized_llama, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_without_an_exchange_the_old_one_is_put_back(quantized_llama: Any, tmp_path: Path) -> None:
    # Killed between the two renames.
    old = save(quantized_llama, tmp_path / "out")
    work = tmp_path / ".out.partial"
    (work / "whole").mkdir(parents=True)
    old.rename(work / "old")
    with staged(tmp_path / "out"):
        load(tmp_path / "out")
    load(tmp_path / "out")
    _leave_nothing(tmp_path)


@pytest.mark.parametrize("inside", [True, False])
def test_an_empty_work_folder_says_nothing_of_a_checkpoint(
    quantized_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """Whoever made it: the checkpoint is neither taken back nor replaced."""
    out = save(quantized_llama, tmp_path / "out")
    if inside:
        monkeypatch.chdir(out)
    (out / ".out.partial" if inside else tmp_path / ".out.partial").mkdir()
    message = "current folder" if inside else "--overwrite"
    with pytest.raises(sq_cpu.SqCpuError, match=message), staged(out, replace=False):
        pass
    load(out)


@pytest.mark.parametrize("moved", range(4))
def test_a_fill_that_was_killed_is_filled_again(
    quantized_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    """In a folder that cannot be replaced, after each number of files that were moved."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    whole = save(quantized_llama, tmp_path / "elsewhere")
    work = out / ".out.partial"
    work.mkdir()
    (work / "lock").touch()
    (out / ".out.partial.moving").touch()
    whole.rename(work / "whole")
    for entry in sorted((work / "whole").iterdir(), key=staging._is_config)[:moved]:
        entry.rename(out / entry.name)
    save(quantized_llama, out)
    load(out)
    assert sorted(os.listdir(out)) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
