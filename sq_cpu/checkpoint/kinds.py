"""What a folder holds, by the quantization method that its config.json names.

One row a method: `load`, `load_source` and the commands know folders of a method by this alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sq_cpu.checkpoint.compressed_config import COMPRESSED_TENSORS
from sq_cpu.checkpoint.compressed_layers import GET_AGAIN
from sq_cpu.checkpoint.compressed_load import (
    compressed_config,
    open_compressed,
    record_of_layers,
)
from sq_cpu.checkpoint.config import (
    CONFIG,
    FORMAT_VERSION,
    QUANT_METHOD,
    check_files,
    check_settings,
    record_of_settings,
)
from sq_cpu.checkpoint.curves import with_stored_curves
from sq_cpu.checkpoint.stored import Stored, StoredTensors
from sq_cpu.errors import SqCpuError
from sq_cpu.parsing import read_json
from sq_cpu.quantization.record import QuantizationRecord
from sq_cpu.scheme import Scheme

__all__ = ["KINDS", "Kind", "Opened", "is_for_floats", "is_int8", "kind_of", "quantization_of"]

_Settings = Mapping[str, Any]


class Opened(NamedTuple):
    """A quantized model's record and tensors, laid out as our checkpoints are."""

    record: QuantizationRecord
    stored: Stored
    version: int
    """Of the layout."""
    fix: str
    """What to do where both do not fit the model."""


@dataclass(frozen=True)
class Kind:
    """How folders of a method are read. All raise `SqCpuError` for what they cannot."""

    opened: Callable[[Path, _Settings, bool, str | Scheme | None], AbstractContextManager[Opened]]
    """Of a folder, its quantization_config, whether digests are compared, and a scheme for what has
    none."""
    is_int8: Callable[[Path, _Settings], bool]
    """Whether that is all that there is to know: no scheme is needed."""
    floats: Callable[[Path, _Settings], AbstractContextManager[Stored]] | None
    """The tensors of the float model that the integers stand for; None: that is not to be had."""


@contextmanager
def _ours(
    folder: Path, settings: _Settings, verify: bool, scheme: str | Scheme | None
) -> Iterator[Opened]:
    path = folder / CONFIG
    check_settings(settings, path)
    if scheme is not None:
        raise SqCpuError(f"{path} says the scheme of this checkpoint; leave out scheme")
    files = check_files(folder, settings, verify=verify)
    record = record_of_settings(settings, path)
    record = with_stored_curves(record, folder, settings)
    with StoredTensors(folder, files) as stored:
        yield Opened(record, stored, settings["format_version"], "save the model again")


@contextmanager
def _compressed(
    folder: Path, settings: _Settings, verify: bool, scheme: str | Scheme | None
) -> Iterator[Opened]:
    config = compressed_config(folder, settings)  # its files have no digests to verify
    with open_compressed(folder, config, as_float=False) as stored:
        record = record_of_layers(stored.layers, scheme, folder / CONFIG)
        yield Opened(record, stored, FORMAT_VERSION, GET_AGAIN)


KINDS: Mapping[str, Kind] = {
    QUANT_METHOD: Kind(opened=_ours, is_int8=lambda folder, settings: True, floats=None),
    COMPRESSED_TENSORS: Kind(
        opened=_compressed,
        is_int8=lambda folder, settings: compressed_config(folder, settings).as_int8,
        floats=lambda folder, settings: open_compressed(
            folder, compressed_config(folder, settings), as_float=True
        ),
    ),
}


def kind_of(settings: _Settings, path: Path) -> Kind:
    """Return how a quantization_config is read; `SqCpuError`, naming `path`, for another method."""
    kind = KINDS.get(str(settings.get("quant_method")))
    if kind is None:
        raise SqCpuError(
            f"{path}: quant_method is {settings.get('quant_method')!r}, expected "
            f"{' or '.join(map(repr, KINDS))}; load it with transformers instead"
        )
    return kind


def quantization_of(folder: Path) -> _Settings | None:
    """Return a folder's quantization_config; None where it has none that names a method."""
    try:
        settings: _Settings = read_json(folder / CONFIG)["quantization_config"]
        return settings if settings["quant_method"] is not None else None
    except (SqCpuError, LookupError, TypeError):
        return None  # not there or not readable: what loads the model says so, with the reason


def is_int8(folder: Path) -> bool:
    """Say whether `load` reads a folder as it is.

    `SqCpuError` says what is wrong with a quantization_config of a method that it knows.
    """
    kind, settings = _known(folder)
    return kind is not None and kind.is_int8(folder, settings)


def is_for_floats(folder: Path) -> bool:
    """Say whether a folder is read as the floats that its integers stand for; raises alike."""
    kind, _ = _known(folder)
    return kind is not None and kind.floats is not None and not is_int8(folder)


def _known(folder: Path) -> tuple[Kind | None, _Settings]:
    settings = quantization_of(folder)
    return (None, {}) if settings is None else (KINDS.get(str(settings["quant_method"])), settings)
