"""Pairs of texts, from files of two columns."""

from __future__ import annotations

from pathlib import Path

from sq_cpu.errors import SqCpuError
from sq_cpu.parsing import parsed_json

__all__ = ["PAIRS", "Pair", "read_pairs", "read_text"]

PAIRS = (".tsv", ".jsonl")
Pair = tuple[str, str]


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file that is not blank."""
    if path.is_dir():
        raise SqCpuError(f"{path} is a folder: give files of text")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise SqCpuError(f"{path}: no such file or folder; give a file of text") from error
    except UnicodeDecodeError as error:
        raise SqCpuError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
    if not text.strip():
        raise SqCpuError(f"{path} holds no text")
    return text


def read_pairs(path: Path) -> list[Pair]:
    """Return the pairs of a file: two columns parted by a tab (.tsv), or JSON lines (.jsonl).

    A JSON line is a list of two texts, or an object with two; what else it has is no text.
    `SqCpuError` names the line that holds something else.
    """
    is_json = path.suffix.lower() == ".jsonl"
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        fields = _texts(parsed_json(line, where)) if is_json else line.split("\t")
        match fields:
            case [first, second] if first.strip() and second.strip():
                found.append((first, second))
            case _:
                full = sum(bool(field.strip()) for field in fields)
                raise SqCpuError(f"{where} holds {full} texts: give two a line")
    return found


def _texts(value: object) -> list[str]:
    values = list(value.values()) if isinstance(value, dict) else value
    return [each for each in values if isinstance(each, str)] if isinstance(values, list) else []
