"""What a binary asks of the system that loads it, held against manylinux_2_28."""

import os
import re
import subprocess
from pathlib import Path

# PEP 600's promise of that tag, as auditwheel has it: glibc 2.28 and what GCC 8 brought.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
SYSTEM = {
    *("ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libgcc_s.so.1", "libm.so.6"),
    *("libpthread.so.0", "librt.so.1", "libstdc++.so.6"),
}
OURS = "libsq_cpu_torch.so"


def faults(binary: Path) -> list[str]:
    """Return what keeps a binary from being part of a wheel; an empty list: nothing."""
    said = subprocess.check_output(
        ["readelf", "-W", "--version-info", "--dynamic", "--program-headers", binary],
        env={**os.environ, "LC_ALL": "C"},
        text=True,
    )
    found = []
    for name in sorted(set(re.findall(r"Name: (\S+)  Flags", said.partition("needs section")[2]))):
        kind, _, version = name.partition("_")
        numbers = re.fullmatch(r"[\d.]+", version) and tuple(map(int, version.split(".")))
        if not numbers or numbers > NEWEST.get(kind, ()):
            found.append(f"needs {name}")
    for library in re.findall(r"\(NEEDED\) .*\[(.*)\]", said):
        if library not in SYSTEM and library != OURS:
            found.append(f"is linked with {library}")
    for path in ":".join(re.findall(r"\((?:RPATH|RUNPATH)\) .*\[(.*)\]", said)).split(":"):
        if path and path != "$ORIGIN" and not path.startswith("$ORIGIN/"):
            found.append(f"looks for libraries in {path}")
    [stack] = re.findall(r"GNU_STACK .* ([RWE]+) +0x", said)
    if "E" in stack:
        found.append("has an executable stack")
    return found
