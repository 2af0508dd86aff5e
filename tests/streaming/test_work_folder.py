"""Interrupted streaming goes on from its work folder, or says why it cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from float_folders import assert_equal, batches, float_folder, in_memory

import sq_cpu
from sq_cpu import Scheme, SqCpuError
from sq_cpu.checkpoint.folder import staged
from sq_cpu.streaming import streaming
from sq_cpu.streaming.stream import Stream

_KILLED = """
import os, signal, sys
sys.path = {path!r}
from pathlib import Path
import float_folders
from sq_cpu import quantize_checkpoint
from sq_cpu.streaming import streaming
finish = streaming.State.finish
def finish_and_die(self, *args):
    finish(self, *args)
    if self.blocks == 2:
        os.kill(os.getpid(), signal.SIGKILL)
streaming.State.finish = finish_and_die
quantize_checkpoint({source!r}, {out!r}, float_folders.batches(), scheme="O3")
"""


@pytest.fixture
def blocks_done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of the blocks that are quantized from now on."""
    done: list[int] = []
    block = Stream.block

    def counted(self: Any, index: int, *rest: Any) -> Any:
        done.append(index)
        return block(self, index, *rest)

    monkeypatch.setattr(Stream, "block", counted)
    return done


def stop_after(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """Raise KeyboardInterrupt once so many blocks are finished."""
    finish = streaming.State.finish

    def interrupted(self: Any, *args: Any) -> None:
        finish(self, *args)
        if self.blocks == blocks:
            monkeypatch.setattr(streaming.State, "finish", finish)
            raise KeyboardInterrupt

    monkeypatch.setattr(streaming.State, "finish", interrupted)


def test_a_killed_process_is_resumed(tmp_path: Path, blocks_done: list[int]) -> None:
    source, out = float_folder(tmp_path / "float"), tmp_path / "out"
    values = {"path": sys.path, "source": str(source), "out": str(out)}
    killed = subprocess.run([sys.executable, "-c", _KILLED.format(**values)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert streaming.unfinished(out) == tmp_path / ".out.partial"
    said: list[str] = []
    sq_cpu.quantize_checkpoint(source, out, batches(), scheme="O3", say=said.append)
    assert said == ["resuming: 2 of 3 blocks are finished"]
    assert blocks_done == [2]
    assert streaming.unfinished(out) is None
    in_memory(source, tmp_path / "whole", Scheme.of("O3"))
    assert_equal(out, tmp_path / "whole")


def test_every_interruption_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = float_folder(tmp_path / "float", "mixtral"), tmp_path / "out"
    scheme = Scheme.of("O3", ignore=())
    for blocks in (1, 2, 3):
        stop_after(monkeypatch, blocks)
        with pytest.raises(KeyboardInterrupt):
            sq_cpu.quantize_checkpoint(source, out, batches(), scheme=scheme)
    sq_cpu.quantize_checkpoint(source, out, batches(), scheme=scheme)
    in_memory(source, tmp_path / "whole", scheme)
    assert_equal(out, tmp_path / "whole")


def test_an_interruption_before_the_first_block_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = float_folder(tmp_path / "float")
    stop_after(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        sq_cpu.quantize_checkpoint(source, tmp_path / "new" / "out", batches())
    assert [entry.name for entry in tmp_path.iterdir()] == ["float"]


@pytest.mark.parametrize("changed", ["alpha", "scheme", "batches", "source"])
def test_other_settings_do_not_resume(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks_done: list[int]
) -> None:
    source, out = float_folder(tmp_path / "float"), tmp_path / "out"
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        sq_cpu.quantize_checkpoint(source, out, batches())
    given: dict[str, Any] = {"batches": batches()}
    if changed == "batches":
        given["batches"] = batches()[1:]
    elif changed == "source":
        file = min(source.glob("*.safetensors"))
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    else:
        given[changed] = {"alpha": 0.7, "scheme": "O2"}[changed]
    with pytest.raises(SqCpuError, match=rf"another {changed}; .*--overwrite"):
        sq_cpu.quantize_checkpoint(source, out, **given)
    assert blocks_done == [0, 1]
    sq_cpu.quantize_checkpoint(source, out, overwrite=True, **given)
    assert blocks_done == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    "file",
    ["carried-2.safetensors", "outer.safetensors", "checkpoint/model-00002-of-00004.safetensors"],
)
def test_damaged_work_is_refused(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = float_folder(tmp_path / "float"), tmp_path / "out"
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        sq_cpu.quantize_checkpoint(source, out, batches())
    damaged = tmp_path / ".out.partial" / file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(SqCpuError, match=r"damaged; remove .* and start anew"):
        sq_cpu.quantize_checkpoint(source, out, batches())


def _deep(state: dict[str, Any]) -> str:
    return "[" * 100_000


def _set(*keys: Any, to: Any) -> Callable[[dict[str, Any]], str]:
    def change(state: dict[str, Any]) -> str:
        holder: Any = state
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = to
        return json.dumps(state)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _deep,
        lambda _: "[]",
        _set("x", to=1),
        _set("outputs", to=10**12),
        _set("settings", to=None),
        _set("parts", to={}),
        _set("parts", to=[]),
        _set("parts", 1, to="x"),
        _set("parts", 1, "tokens", to="x"),
        _set("parts", 1, "file", to=7),
        _set("parts", 1, "file", to="../state.json"),
        _set("parts", 1, "file", to="/dev/zero"),
        _set("parts", 1, "file", to="none"),
        _set("digests", "../x", to="x"),
        _set("digests", to={}),
    ],
)
def test_a_damaged_state_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], str]
) -> None:
    source, out = float_folder(tmp_path / "float"), tmp_path / "out"
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        sq_cpu.quantize_checkpoint(source, out, batches())
    state = tmp_path / ".out.partial" / "state.json"
    state.write_text(change(json.loads(state.read_text())))
    with pytest.raises(SqCpuError, match=r"state\.json is damaged \(.*; remove .* and start anew"):
        sq_cpu.quantize_checkpoint(source, out, batches())


def test_two_processes_do_not_share_the_work(tmp_path: Path) -> None:
    source, out = float_folder(tmp_path / "float"), tmp_path / "out"
    with (
        staged(out),
        pytest.raises(SqCpuError, match="another process is at work"),
    ):
        sq_cpu.quantize_checkpoint(source, out, batches())
