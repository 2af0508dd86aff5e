"""The peaks of this machine, by `peak.cc`: int8 multiply-adds on registers, and reading memory."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import psutil
import typer
from machine import beyond_cache, headline, make_console, numbers
from rich.table import Table

from sq_cpu.progress import track

READ = "read_gb_per_s"
ISAS = ("avx2", "avx512bw", "avx512_vnni", "amx_int8")
_SECONDS = 0.3  # of each register loop
_READ_BYTES = 1 << 30


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    source = Path(__file__).with_name("peak.cc")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libpeak.so"
        flags = ["-std=c++17", "-O2", "-pthread", "-fPIC", "-shared"]
        try:
            subprocess.run([*compiler, *flags, str(source), "-o", str(library)], check=True)
        except FileNotFoundError as error:
            raise RuntimeError("no C++ compiler found: install g++, or set CXX") from error
        loaded = ctypes.CDLL(str(library))
    loaded.sq_peak_gops.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_double]
    loaded.sq_peak_read_gb_per_s.argtypes = [ctypes.c_int, ctypes.c_int64]
    loaded.sq_peak_gops.restype = loaded.sq_peak_read_gb_per_s.restype = ctypes.c_double
    return loaded


def measure(threads: int) -> dict[str, float]:
    """Measure for some seconds what `threads` threads reach together.

    Returns
    -------
    int8 GOPS of each instruction set that runs here, and GB/s of reading memory as READ
    """
    library = _library()
    gops = {isa: library.sq_peak_gops(isa.encode(), threads, _SECONDS) for isa in ISAS}
    size = min(max(_READ_BYTES, beyond_cache()), psutil.virtual_memory().available // 4)
    read = read_gb_per_s(threads, size)
    return {isa: value for isa, value in gops.items() if value > 0} | {READ: read}


def read_gb_per_s(threads: int, size: int) -> float:
    """Return the GB/s at which so many threads read `size` bytes, the best of four times."""
    read: float = _library().sq_peak_read_gb_per_s(threads, size)
    if read <= 0:
        raise RuntimeError(f"cannot read {size >> 20} MB of memory by AVX2")
    return read


def best(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Return the higher of two measurements, figure by figure: noise only ever takes away."""
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in one | other}


def main(
    threads: Annotated[str, typer.Option(help='Thread counts; "all" for every core.')] = "1,all",
    repeats: Annotated[int, typer.Option(help="Measurements; the best counts.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print int8 GOPS of each instruction set's register loop, and the GB/s memory is read at."""
    counts = numbers(threads)
    peaks: dict[int, dict[str, float]] = {count: {} for count in counts}
    for count in track(counts * repeats, "measuring"):
        peaks[count] = best(peaks[count], measure(count))
    if as_json:
        typer.echo(json.dumps(peaks, indent=1))
        return
    print(headline())
    table = Table("threads", *(f"{isa} GOPS" for isa in ISAS), "read GB/s", title="peaks")
    for count, found in peaks.items():
        cells = (f"{found[name]:.0f}" if name in found else "-" for name in ISAS)
        table.add_row(str(count), *cells, f"{found[READ]:.1f}")
    make_console().print(table)


if __name__ == "__main__":
    typer.run(main)
