from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_models import byte_model, byte_tokenizer
from tiny import batches

import sq_cpu
from sq_cpu import SqCpuError
from sq_cpu.parsing import check_whole, read_json


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


@pytest.mark.parametrize("number", [-1, 0, 1.0, float("nan"), True, None, "2", [2]])
def test_what_is_no_whole_number_is_refused_by_name(number: object) -> None:
    with pytest.raises(SqCpuError, match=r"windows is .*, not a whole number >= 1"):
        check_whole(1, window=5, windows=number)


def test_whole_numbers_pass() -> None:
    check_whole(1, small=1, great=10**30, of_numpy=np.int64(3))


NUMBERS: dict[str, Callable[[Any, Any], object]] = {
    "rows": lambda model, number: sq_cpu.calibrate(model, batches(), rows=number),
    "gradient_rows": lambda model, number: sq_cpu.calibrate(model, batches(), gradient_rows=number),
    "outliers": lambda model, number: sq_cpu.tune(
        model, sq_cpu.calibrate(model, batches()), outliers=number
    ),
    "window": lambda model, number: sq_cpu.perplexity(
        model, byte_tokenizer(), "a text", window=number
    ),
    "windows": lambda model, number: sq_cpu.perplexity(
        model, byte_tokenizer(), "a text", windows=number
    ),
    "max_shard_size": lambda model, number: sq_cpu.save(
        sq_cpu.quantize(model, smooth=False), "never", max_shard_size=number
    ),
} | {
    name: lambda model, number, name=name: sq_cpu.autotune(
        model, batches(), lambda _: 1.0, **{name: number}
    )
    for name in ("trials", "refine_trials", "workers", "tokens", "seed")
}


@pytest.mark.parametrize("number", [None, "two", [2]])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_a_caller_gives_are_checked(
    name: str, number: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SqCpuError, match=f"^{name} is "):
        NUMBERS[name](byte_model(), number)
    assert not list(tmp_path.iterdir())
