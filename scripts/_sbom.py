"""The SBOM of a release: what its wheels contain, and the packages that they run with.

    python scripts/_sbom.py ENVIRONMENT.json FOLDER

ENVIRONMENT.json is CycloneDX of an environment in which a wheel was installed. FOLDER has the sdist
and the wheels; the SBOM is written beside them, as sq_cpu-VERSION.cdx.json.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import uuid
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def file_component(name: str, data: bytes) -> dict[str, Any]:
    """Return a file of the release as a component."""
    digest = hashlib.sha256(data).hexdigest()
    return {
        "type": "file",
        "bom-ref": f"file:{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }


def release_file(path: Path) -> dict[str, Any]:
    """Return the sdist, or a wheel with all that is in it."""
    component = file_component(path.name, path.read_bytes())
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            component["components"] = [
                {**file_component(name, wheel.read(name)), "bom-ref": f"file:{path.name}/{name}"}
                for name in sorted(wheel.namelist())
            ]
    return component


def compiled_in() -> dict[str, Any]:
    """Return pybind11: headers alone, compiled into the extension."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(r"^pybind11==(\S+)", constraints, re.MULTILINE)
    assert found is not None
    return {
        "type": "library",
        "bom-ref": f"pkg:pypi/pybind11@{found[1]}",
        "name": "pybind11",
        "version": found[1],
        "purl": f"pkg:pypi/pybind11@{found[1]}",
        "description": "compiled into sq_cpu/kernels/_core",
        "licenses": [{"license": {"id": "BSD-3-Clause"}}],
    }


def main() -> None:
    """Write the SBOM."""
    environment, folder = map(Path, sys.argv[1:])
    bom = json.loads(environment.read_text(encoding="utf-8"))
    subject = bom["metadata"]["component"]
    subject |= {"type": "library", "purl": f"pkg:pypi/{subject['name']}@{subject['version']}"}
    pybind11 = compiled_in()
    bom["components"].append(pybind11)
    [needed] = [row for row in bom["dependencies"] if row["ref"] == subject["bom-ref"]]
    needed["dependsOn"] = sorted([*needed["dependsOn"], pybind11["bom-ref"]])
    bom["dependencies"].append({"ref": pybind11["bom-ref"]})
    files = sorted(path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz")))
    subject["components"] = [release_file(path) for path in files]
    # Attestations ask for a serial number; this one is the same for the same files.
    contents = json.dumps(subject["components"], sort_keys=True)
    bom["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, contents)}"
    out = folder / f"sq_cpu-{subject['version']}.cdx.json"
    out.write_text(json.dumps(bom, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
