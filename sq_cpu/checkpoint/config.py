"""What a checkpoint's config.json says of it: read, and held against the files it names.

`sq_cpu.checkpoint` describes the format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.inference.prefix import MOST_TOKENS
from sq_cpu.kernels.hadamard import BLOCK
from sq_cpu.kernels.ops import FLOATS
from sq_cpu.parsing import read_json, typed
from sq_cpu.quantization.record import QuantizationRecord

__all__ = [
    "CONFIG",
    "EXPORTED",
    "FORMAT_VERSION",
    "INDEX",
    "QUANT_METHOD",
    "SETTINGS_DIGEST",
    "check_dtype",
    "check_files",
    "check_names",
    "check_settings",
    "exported_digest",
    "read_content",
    "read_written",
    "record_of_settings",
    "settings_digest",
    "sha256",
]

FORMAT_VERSION = 9
QUANT_METHOD = "sq_cpu"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SETTINGS_DIGEST = "settings_sha256"
EXPORTED = "sq_cpu_export"
"""Entry of config.json, where another method has quantization_config: ``files`` and ``companions``
as of ours, and under `SETTINGS_DIGEST` what `exported_digest` gives."""


def read_content(folder: Path) -> dict[str, Any]:
    """Read config.json, which has a ``quantization_config``, of whatever method."""
    path = folder / CONFIG
    if not path.exists():
        raise SqCpuError(f"{path} does not exist; give the folder that sq_cpu.save wrote")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("quantization_config"), dict):
        raise SqCpuError(
            f"{path} has no quantization_config: not a quantized model; run sq_cpu.quantize first"
        )
    return content


def read_written(folder: Path) -> set[str]:
    """Return the paths within a folder of what `save` wrote, in whatever format.

    `SqCpuError` where it wrote none of it.
    """
    content, path = read_content(folder), folder / CONFIG
    listed: Any = content["quantization_config"]
    if listed.get("quant_method") != QUANT_METHOD and EXPORTED in content:
        listed = typed(dict[str, Any], content[EXPORTED], str(path))
        if listed.get(SETTINGS_DIGEST) != exported_digest(content):
            raise SqCpuError(f"{path} was edited, or written by another tool")
    else:
        check_settings(listed, path)
    written = {CONFIG}
    for key in ("files", "companions"):
        names = typed(dict[str, str] | list[str], listed.get(key, []), f"{path}: {key}")
        written.update(names)
    return written


def exported_digest(content: Mapping[str, Any]) -> str:
    """Give the SHA-256 of a config.json without `EXPORTED`, which others who save it carry on."""
    return settings_digest({name: value for name, value in content.items() if name != EXPORTED})


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ``SqCpuError`` for a dtype that the layers do not run in; None is as stored."""
    if dtype is not None and dtype not in FLOATS:
        raise SqCpuError(f"dtype is {dtype}, expected torch.float32, torch.bfloat16 or float16")


def check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Raise ``SqCpuError``, naming ``path``, for another method's settings or a newer format."""
    if settings.get("quant_method") != QUANT_METHOD:
        raise SqCpuError(
            f"{path}: quant_method is {settings.get('quant_method')!r}, expected "
            f"{QUANT_METHOD!r}; load it with transformers instead"
        )
    version = settings.get("format_version")
    if type(version) is not int or version < 1:  # a bool is an int
        raise SqCpuError(f"{path}: format_version is {version!r}, expected a positive integer")
    if version > FORMAT_VERSION:
        raise SqCpuError(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}, the newest this "
            "sq_cpu reads; upgrade sq_cpu"
        )


def record_of_settings(settings: Mapping[str, Any], path: Path) -> QuantizationRecord:
    """Give what a ``quantization_config`` records; ``SqCpuError`` names ``path`` if it is bad."""
    try:
        for key in ("layers", "smoothed"):
            names = settings.get(key, None if key == "layers" else [])
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise SqCpuError(f"{key} is not a list of names")
        decomposed = settings.get("decomposed", {})
        if not isinstance(decomposed, dict) or not all(
            type(count) is int and count > 0 for count in decomposed.values()
        ):
            raise SqCpuError("decomposed is not a table of layers and positive counts")
        hadamard = settings.get("hadamard", {})
        if not isinstance(hadamard, dict) or not all(
            type(size) is int and size == BLOCK for size in hadamard.values()
        ):
            raise SqCpuError(f"hadamard is not a table of layers and {BLOCK}")
        prefix = settings.get("prefix", [])
        if not isinstance(prefix, list) or not all(type(token) is int for token in prefix):
            raise SqCpuError("prefix is not a list of token ids")
        if len(prefix) > MOST_TOKENS:
            raise SqCpuError(f"prefix has {len(prefix)} tokens, more than {MOST_TOKENS}")
        embeddings = settings.get("embeddings", {})
        if not isinstance(embeddings, dict) or not set(embeddings.values()) <= set(
            settings["layers"]
        ):
            raise SqCpuError("embeddings is not a table of modules and layers")
        if set(embeddings.values()) & (set(decomposed) | set(hadamard)):
            raise SqCpuError("embeddings names a layer with channels in float, or a rotated one")
        misfits = settings.get("misfits", {})
        if not isinstance(misfits, dict) or not all(
            type(share) in (int, float) and 0 <= share <= 1 for share in misfits.values()
        ):
            raise SqCpuError("misfits is not a table of layers and shares from 0 to 1")
        for key in ("smoothed", "decomposed", "hadamard", "misfits"):
            if unknown := sorted(set(settings.get(key, ())) - set(settings["layers"])):
                raise SqCpuError(f"{key} names {unknown[0]}, which is not one of layers")
        return QuantizationRecord.from_dict(settings)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise SqCpuError(
            f"{path}: bad quantization_config ({first_line(error)}); "
            "save the model again with sq_cpu.save"
        ) from error


def check_files(folder: Path, settings: Mapping[str, Any], *, verify: bool) -> list[str]:
    """Give the names of the safetensors files, all of which exist.

    ``verify`` compares these and ``quantization_config`` with their SHA-256. What is missing or
    damaged raises ``SqCpuError``.
    """
    config = folder / CONFIG
    if verify and settings["format_version"] >= 5:  # before, the digest was of the whole file
        _check_digest(config, settings_digest(settings), settings.get(SETTINGS_DIGEST))
    files = settings.get("files")
    if not isinstance(files, dict) or not files:
        raise SqCpuError(f"{config} lists no files; save the model again")
    check_names(folder, files, config)
    for name, digest in files.items() if verify else ():
        _check_digest(folder / name, sha256(folder / name), digest)
    return list(files)


def check_names(folder: Path, names: Iterable[str], listed: Path) -> None:
    """Raise ``SqCpuError`` for a name, ``listed`` in a file, of no file within the folder."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise SqCpuError(f"{listed}: file name {name!r} leaves the folder; rename it")
        if not os.path.isfile(folder / name):  # unlike Path.is_file, False for any bad name
            raise SqCpuError(f"{folder / name} does not exist; copy the checkpoint again")


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Give the SHA-256 of a ``quantization_config``: its sorted JSON, without this digest."""
    others = {name: value for name, value in settings.items() if name != SETTINGS_DIGEST}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _check_digest(path: Path, found: str, stored: object) -> None:
    if found != stored:
        raise SqCpuError(
            f"{path} is damaged or was edited: its SHA-256 is not the one in {CONFIG}; copy the "
            "checkpoint again, or load what you edited with sq_cpu.load(path, verify=False)"
        )


def sha256(path: Path) -> str:
    """Give a file's SHA-256; ``SqCpuError`` where it cannot be read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise SqCpuError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
