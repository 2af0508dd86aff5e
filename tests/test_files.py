"""Files that are written: whole, through links, with their modes, and by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sq_cpu.checkpoint.folder import staged
from sq_cpu.errors import SqCpuError
from sq_cpu.files import absolute, check_file, claimed_file, exchange, locked, write_file
from sq_cpu.streaming.streaming import unfinished


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "new", "text")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == 0o666 & ~umask
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("old", [0o600, 0o640, 0o444, 0o755])
def test_a_file_keeps_its_mode_and_a_link_stays(tmp_path: Path, old: int) -> None:
    (tmp_path / "folder").mkdir()
    real, link = tmp_path / "folder" / "real", tmp_path / "link"
    real.write_text("before")
    real.chmod(old)
    link.symlink_to(Path("folder") / "real")
    write_file(link, b"after")
    assert real.read_bytes() == b"after"
    assert mode(real) == old
    assert link.is_symlink()
    assert os.listdir(tmp_path / "folder") == ["real"]


def test_a_link_to_nothing_makes_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "text"


def test_devices_and_fifos_are_written_to(tmp_path: Path) -> None:
    before = os.stat("/dev/null")
    write_file("/dev/null", "text")
    assert os.path.samestat(before, os.stat("/dev/null"))
    with pytest.raises(SqCpuError, match="cannot write /dev/full: No space left on device"):
        write_file("/dev/full", "text")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_text()))
    reader.start()
    with claimed_file(fifo) as left:
        assert not left
        write_file(fifo, "text")
    reader.join()
    assert read == ["text"]
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_what_stdout_is_redirected_to_is_not_replaced(tmp_path: Path) -> None:
    program = (
        "print('first')\n"
        "from sq_cpu.files import write_file\n"
        "write_file('/dev/stdout', 'second\\n')\n"
        "print('third')"
    )
    out = tmp_path / "out"
    with out.open("w") as file:
        subprocess.run([sys.executable, "-c", program], stdout=file, check=True)
    assert out.read_text() == "first\nsecond\nthird\n"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "missing parent", "a file as parent", "a link's loop"])
def test_what_cannot_be_written_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    path = {
        "folder": tmp_path,
        "missing parent": tmp_path / "no" / "file",
        "a file as parent": tmp_path / "file" / "x",
        "a link's loop": tmp_path / "loop",
    }[kind]
    for call in (check_file, lambda path: write_file(path, "text")):
        with pytest.raises(SqCpuError) as caught:
            call(path)
        assert len(str(caught.value).splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SqCpuError, match="No space left on device"):
        write_file(path, "after")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_one_process_holds_a_file_and_what_a_killed_one_left_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with (
        claimed_file(path) as left,
        pytest.raises(SqCpuError, match="another process is to write"),
        claimed_file(path),
    ):
        raise AssertionError
    assert not left
    assert not os.listdir(tmp_path)
    # As a killed process leaves them; nobody holds them.
    for name in (".plan.json.sq_cpu.lock", ".plan.json.sq_cpu.tmp"):
        (tmp_path / name).write_text("half")
    with claimed_file(path) as left:
        assert left
        write_file(path, "whole")
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["plan.json"]


def _write_often(path: str, content: str) -> None:
    for _ in range(200):
        write_file(path, content)


def test_two_writers_at_once_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = ["a" * 5000, "b" * 9000]
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_often, args=(str(path), c)) for c in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert path.read_text() in contents
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["file"]


def test_a_held_lock_is_waited_for_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path), pytest.raises(BlockingIOError), locked(path):
        raise AssertionError
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("is_left", [False, True])
def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_left: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "file"
    path.write_text("before")
    left = [f".file.sq_cpu.{kind}" for kind in ("tmp", "lock")] if is_left else []
    for name in left:
        (tmp_path / name).touch()
    opened = len(os.listdir("/proc/self/fd"))
    for call in (lambda: write_file(path, "after"), lambda: claimed_file(path).__enter__()):
        with pytest.raises(SqCpuError, match=r"on a file system without locks \(flock: .*choose"):
            call()
    assert len(os.listdir("/proc/self/fd")) == opened
    assert sorted(os.listdir(tmp_path)) == sorted(["file", *left])
    assert path.read_text() == "before"


def test_a_folder_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(SqCpuError, match="the current folder was removed"):
        absolute("out")
    for call in (check_file, lambda path: write_file(path, "text")):
        with pytest.raises(SqCpuError, match="cannot write out"):
            call("out")
    for call in (unfinished, lambda path: staged(path).__enter__()):
        with pytest.raises(SqCpuError, match="cannot write checkpoint out"):
            call("out")


def test_exchange(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").is_dir()
    assert (tmp_path / "a").read_text() == "b"
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")
