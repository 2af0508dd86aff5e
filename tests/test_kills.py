"""kill -9 at every file event: old or new is whole at OUT, and the same command goes on.

With SQ_CPU_KILLS=all at every event, with 1/4 at those of the second of four parts; else at all of
the short commands, and at a spread of the long ones.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from byte_models import byte_model, save_float
from command_line import TEXT
from killed_command import Warm

import sq_cpu
from sq_cpu import SmoothPlan

_SMALL = ["--calib", "text.txt", "--window", "32", "--windows", "2"]
_SCORED = ["--goal", "50%", "--text", "other.txt", "--text-windows", "2"]
_SHORT = [*_SCORED, "--trials", "2", "--refine-trials", "1", "--tokens", "4"]


class _Kind(NamedTuple):
    """A command, and what it makes."""

    command: list[object]
    out: str
    spread: int
    """Events that the tests kill at, when not at all."""
    overwrite: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    """What else it leaves, beside OUT."""


_KINDS = {
    "save": _Kind(["save", "out"], "out", 100),
    "quantize": _Kind(
        ["quantize", "float", "-o", "out", "--no-smooth"], "out", 6, ("--overwrite",)
    ),
    "stream": _Kind(
        ["quantize", "float", "-o", "out", "--stream", "--scheme", "O3", *_SMALL],
        *("out", 8, ("--overwrite",)),
    ),
    "auto": _Kind(
        ["quantize", "float", "-o", "out", "--scheme", "auto", *_SMALL, *_SCORED],
        *("out", 4, ("--overwrite",)),
    ),
    "tune": _Kind(["tune", "float", "-o", "plan.json", *_SMALL], "plan.json", 4),
    "autotune": _Kind(
        ["autotune", "float", "-o", "plan.json", *_SMALL, *_SHORT],
        *("plan.json", 5, (), ("plan.db",)),
    ),
    "workers": _Kind(
        ["autotune", "float", "-o", "plan.json", *_SMALL, *_SHORT, "--workers", "2"],
        *("plan.json", 1, (), ("plan.db",)),
    ),
    "report": _Kind(
        ["inspect", "float", "--report", "page.html", *_SMALL],
        *("page.html", 3, (), ("page_files",)),
    ),
}
_TARGETS = ("new", "empty", "overwritten")


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    process = Warm(tmp_path_factory.mktemp("kills") / "root")
    yield process
    process.close()


def _prepare(root: Path, kind: _Kind, target: str) -> None:
    """Make the folder in which the command runs anew."""
    given = root.parent / "given"
    if not given.exists():
        given.mkdir()
        save_float(given / "float")
        (given / "text.txt").write_text(TEXT)
        (given / "other.txt").write_text("Pack my box with five dozen liquor jugs. " * 20)
        sq_cpu.save(sq_cpu.quantize(byte_model(seed=1), smooth=False), given / "old")
        (given / "old.json").write_text(SmoothPlan(()).to_json())
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(given, root, ignore=lambda *_: ["old", "old.json"])
    out = root / kind.out
    if target == "empty":
        out.touch() if out.suffix else out.mkdir()
    elif target == "overwritten":
        shutil.copy(given / "old.json", out) if out.suffix else shutil.copytree(given / "old", out)
        out.chmod(0o600 if out.suffix else 0o700)


def _content(path: Path) -> Any:
    if path.is_dir():
        return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return path.read_bytes() if path.exists() else None


def _cases() -> Iterator[Any]:
    for name in _KINDS:
        for target in _TARGETS:
            slow = (pytest.mark.slow,) if name == "workers" else ()
            yield pytest.param(name, target, id=f"{name}-{target}", marks=slow)


@pytest.mark.timeout(0)  # as many seconds as there are events
@pytest.mark.parametrize(("name", "target"), list(_cases()))
def test_a_killed_command_leaves_old_or_new_and_goes_on(warm: Warm, name: str, target: str) -> None:
    kind, root = _KINDS[name], warm.root
    command = [*kind.command, *(kind.overwrite if target == "overwritten" else ())]
    out = root / kind.out
    _prepare(root, kind, target)
    # Elsewhere, the first run may add to a table of measured costs: it has events that others lack.
    assert warm.run(*command).code == 0
    _prepare(root, kind, target)
    before, given = _content(out), set(os.listdir(root))
    whole = warm.run(*command)
    assert whole.code == 0, whole.said
    after = _content(out)
    made = {kind.out, *kind.made}
    assert set(os.listdir(root)) == given | made
    mode = out.stat().st_mode & 0o777
    if target == "overwritten":
        assert mode == (0o600 if out.suffix else 0o700)

    events = range(whole.events)
    asked = os.environ.get("SQ_CPU_KILLS", "")
    if "/" in asked:
        part, parts = map(int, asked.split("/"))
        events = events[part::parts]
    elif asked != "all":
        step = max(1, -(-len(events) // kind.spread))
        # Another part of them for each target; the last ones always, where things are moved.
        events = sorted({*events[_TARGETS.index(target) % step :: step], *events[-3:]})
    for event in events:
        _prepare(root, kind, target)
        killed = warm.run(*command, kill=event)
        where = f"killed at event {event} of {whole.events}:\n{killed.said}"
        assert killed.code == -9, where
        _check_whole(out, before, after, where)
        again = warm.run(*command)
        assert again.code == 0, f"{where}\nthen:\n{again.said}"
        _check_whole(out, after, after, where)
        assert set(os.listdir(root)) == given | made, where
        assert out.stat().st_mode & 0o777 == mode, where
    print(f"{name}, {target}: {len(list(events))} kills at {whole.events} events")


def _check_whole(out: Path, before: Any, after: Any, where: str) -> None:
    found = _content(out)
    if out.suffix == ".json" and found not in (before, after):
        SmoothPlan.load(out)  # an autotuning's notes have milliseconds
        return
    assert found in (before, after), where
