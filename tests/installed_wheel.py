"""A program, not a test: an installed wheel is sound, quantizes, scores and runs a tiny model.

`scripts/wheels` and cibuildwheel run it with the Python that the wheel was installed for. It fails
when sq_cpu comes from the sources instead.
"""

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from binaries import faults
from byte_models import save_float

import sq_cpu
from sq_cpu.kernels import _core


def main() -> None:
    sources = Path(__file__).resolve().parent.parent
    assert not Path(sq_cpu.__file__).is_relative_to(sources), sq_cpu.__file__
    kernels = Path(_core.__file__).parent
    found = {str(path): faults(path) for path in kernels.rglob("*.so*")}
    assert len(found) == 2, found
    assert not any(found.values()), found
    command = Path(sysconfig.get_path("scripts")) / "sq-cpu"
    quick = ("--windows", "4", "--window", "64")
    with tempfile.TemporaryDirectory() as folder:
        model, out = save_float(Path(folder) / "float"), Path(folder) / "int8"
        for arguments in (
            ["--version"],
            ["info", "--json"],
            ["quantize", model, "-o", out, "--scheme", "O3", *quick],
            ["eval", out, *quick],
            ["generate", out, "Hello", "--max-new-tokens", "4"],
        ):
            subprocess.run([command, *arguments], cwd=folder, check=True, stdout=sys.stderr)
    isa = sq_cpu.isa()["in_use"]
    print(f"sq_cpu {sq_cpu.__version__} works on Python {sys.version.split()[0]}, {isa}")


if __name__ == "__main__":
    main()
