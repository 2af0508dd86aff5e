from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sq_cpu import SqCpuError
from sq_cpu.parsing import read_json


def _of_bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: no disk holds it


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file"),
        (Path.mkdir, "not a file"),
        (os.mkfifo, "not a file"),  # reading would wait for a writer
        (_huge, "larger than 64 MB"),
        (_of_bytes(b"\xff"), "can't decode"),
        (_of_bytes(b""), "Expecting value"),
        (_of_bytes(b"[" * 200_000), "recursion"),
        (_of_bytes(b"1" * 5000), "digits"),
    ],
)
def test_what_is_no_json_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "some.json"
    make(path)
    with pytest.raises(SqCpuError, match=rf"some\.json cannot be read as JSON \(.*{reason}.*\); "):
        read_json(path)


def test_what_is_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text('{"a": ["ä", 1, null]}', encoding="utf-8")
    assert read_json(path) == {"a": ["ä", 1, None]}
