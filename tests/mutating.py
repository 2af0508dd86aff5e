"""Files damaged on purpose, and what a reader may do with them.

The same seed gives the same damage. A reader may return a result or raise `SqCpuError` of one line;
it may not raise anything else, hang, or take more memory than twice the file's size.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sq_cpu.errors import SqCpuError

__all__ = ["fuzz_seeds", "mutated_bytes", "mutated_json", "mutated_safetensors", "refused"]

# Beyond twice the file: what Python, torch and a first call of a library take for themselves.
_CONSTANT = 64 << 20
_MOST = 2 << 30
"""Bytes that end a call before they end the machine."""
_SECONDS = 120  # a loaded machine takes its time, too

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**63, 10**20, -(10**30), 10**400),
    *(0.5, -0.0, 1.5, 1e-320, 1e308, -1e30, float("nan"), float("inf"), -float("inf")),
    *("", "x", "0", "1e5", "null", "\0", "\x1b[31mred\x1b]0;title\x07", "\ud800", "é" * 9, "a/b"),
    *("../../x", "/etc/passwd", "name\nof two lines", "x" * 5000, "float32", "model.layers.0"),
    *([], {}, [0], [None], [[]], [{}], {"": None}, {"name": 1}, [1e9] * 40, ["x", "x"]),
)


def fuzz_seeds(few: int) -> list[int]:
    """Return the seeds of a fuzz test: `few`, or those of SQ_CPU_FUZZ=TO or FROM:TO."""
    first, _, last = os.environ.get("SQ_CPU_FUZZ", f"0:{few}").rpartition(":")
    return list(range(int(first or 0), int(last)))


def mutated_json(text: str, seed: int) -> str:
    """Return JSON text with one to three values or structures changed; it stays JSON."""
    chance = random.Random(seed)
    root = [json.loads(text)]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        _change(root, chance)
        root = json.loads(json.dumps(root))  # a tree again: no part of it twice
    # Numbers without a float's limits, and words that strict JSON has not, are what Python reads.
    return json.dumps(root[0])


def mutated_bytes(data: bytes, seed: int) -> bytes:
    """Return bytes of which some are flipped, overwritten, cut out, repeated or cut off."""
    chance = random.Random(seed)
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        if not changed:
            return bytes(chance.randbytes(chance.randrange(64)))
        begin = chance.randrange(len(changed))
        end = min(len(changed), begin + chance.choice((1, 1, 2, 4, 8, 64, 4096)))
        match chance.randrange(7):
            case 0:
                changed[begin] ^= 1 << chance.randrange(8)
            case 1:
                changed[begin:end] = chance.randbytes(end - begin)
            case 2:
                changed[begin:end] = bytes([chance.choice((0, 255, 127, 128))]) * (end - begin)
            case 3:
                del changed[begin:end]
            case 4:
                changed[begin:begin] = changed[begin:end]
            case 5:
                del changed[begin:]
            case _:
                changed += chance.randbytes(chance.choice((1, 8, 100)))
    return bytes(changed)


def mutated_safetensors(data: bytes, seed: int) -> bytes:
    """Return a safetensors file whose header (its metadata's JSON too), length or bytes changed."""
    chance = random.Random(seed)
    kind = chance.randrange(10)
    if kind == 0:
        return mutated_bytes(data, seed)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if kind == 1:
        wrong = chance.choice((0, length - 1, length + 8, len(data), 2**40, 2**63, 2**64 - 1))
        return wrong.to_bytes(8, "little") + data[8:]
    metadata = header.get("__metadata__") or {}
    inner = [key for key, value in metadata.items() if value[:1] in "{["]
    if kind in (2, 3, 4) and inner:
        key = chance.choice(inner)
        metadata[key] = mutated_json(metadata[key], seed)
        text = json.dumps(header)
    elif kind in (5, 6) and len(header) > 1:
        # A header that still agrees with itself: another dtype or shape of the same bytes.
        name = chance.choice([name for name in header if name != "__metadata__"])
        _reinterpret(header, name, chance)
        text = json.dumps(header)
    elif kind == 7:
        return data[: 8 + length] + mutated_bytes(body, seed)
    else:
        text = mutated_json(json.dumps(header), seed)
    return len(text.encode()).to_bytes(8, "little") + text.encode() + body


def _reinterpret(header: dict[str, Any], name: str, chance: random.Random) -> None:
    entry = header[name]
    begin, end = entry["data_offsets"]
    same = {1: ("I8", "U8", "BOOL"), 2: ("F16", "BF16", "I16"), 4: ("F32", "I32", "U32")}
    same |= {8: ("F64", "I64", "U64")}
    match chance.randrange(5):
        case 0:
            size = chance.choice([size for size in same if (end - begin) % size == 0])
            entry |= {"dtype": chance.choice(same[size]), "shape": [(end - begin) // size]}
        case 1:
            entry["shape"] = chance.choice((entry["shape"][::-1], [*entry["shape"], 1]))
        case 2:
            other = chance.choice(list(header))
            header[name], header[other] = header[other], header[name]
        case 3:
            header[chance.choice((f"{name}.x", "", "x", name.partition(".")[2]))] = header.pop(name)
        case _:
            del header[name]


def _change(root: list[Any], chance: random.Random) -> None:
    places = list(_places(root))
    holder, key = chance.choice(places)
    value = holder[key]
    match chance.randrange(9):
        case 0 | 1 | 2:
            holder[key] = chance.choice(_VALUES)
        case 3 if holder is not root:
            del holder[key]
        case 4:
            other, place = chance.choice(places)
            holder[key] = json.loads(json.dumps(other[place]))
        case 5 if isinstance(holder, dict):
            holder[chance.choice(("", "x", key.upper(), f"{key} ", key[:-1]))] = holder.pop(key)
        case 5 | 6 if isinstance(value, list) and value:
            value.extend([chance.choice(value)] * chance.choice((1, 1, 100)))
        case 6 if isinstance(value, dict):
            value[chance.choice(("x", "name", "format_version"))] = chance.choice(_VALUES)
        case 7:
            holder[key] = [value] if chance.random() < 0.5 else {"x": value}
        case _:
            holder[key] = _nearby(value, chance)


def _nearby(value: Any, chance: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return chance.choice((-value, value + 1, value - 1, value * 10**6, str(value)[:400]))
    if isinstance(value, str):
        return chance.choice((value[1:], value + "x", [*value], ascii(value)))
    return str(value)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


@contextmanager
def _bounded(size: int) -> Iterator[None]:
    """Hold what runs within to a time, and to the memory for files of `size` bytes in all."""

    def late(*_: object) -> None:
        raise AssertionError(f"still at work after {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident = _status("VmRSS")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + _MOST, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    taken = _status("VmHWM") - resident
    assert taken <= 2 * size + _CONSTANT, f"{taken >> 20} MB for files of {size} bytes"


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def refused(call: Callable[[], object], size: int) -> str | None:
    """Return the one line with which a call refuses files of `size` bytes; None: it went well."""
    try:
        with _bounded(size):
            call()
    except SqCpuError as error:
        line = str(error)
        assert len(line.splitlines()) == 1, repr(line)
        assert line.isprintable(), repr(line)
        return line
    return None
