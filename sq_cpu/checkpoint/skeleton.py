"""A model without weights, built from a config.json that nobody has to trust."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from torch.nn.modules import module as registration

from sq_cpu.checkpoint.classes import named_class
from sq_cpu.checkpoint.config import CONFIG
from sq_cpu.checkpoint.entries import unsaved_buffers
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.models.hf_private import bare_model, check_version, from_config, hub_kernels
from sq_cpu.parsing import read_json

__all__ = [
    "UNTRUSTED",
    "check_buffers",
    "check_counts",
    "check_no_kernels",
    "reason_of",
    "skeleton",
]

UNTRUSTED = (
    "it needs code of its own (auto_map), which is not run: read that code, then give "
    "trust_remote_code=True (--trust-remote-code)"
)

# Fields of a config that say how many modules to make, one after another. The other counts only
# size what is made at once.
_MODULES = re.compile(r"(layers?|depths?|blocks?|experts?|stages?)$")
_COUNTS = re.compile(r"^(n|num)_")
_FEW, _MANY = 1000, 1 << 20
_LABELS = 1 << 16  # a config makes a name for each, several times: 2^20 take 11 s and 660 MB
_SPARE = 256 << 20  # causal masks of the largest contexts


def reason_of(error: Exception) -> str:
    """Return one line of what transformers raised, which names an option of its own."""
    return UNTRUSTED if "trust_remote_code" in str(error) else first_line(error)


def skeleton(
    folder: Path, tensors: int, *, auto: Any = None, dtype: Any = None, trust: bool = False
) -> Any:
    """Build a model from its config, with all of its tensors on the meta device.

    Parameters
    ----------
    tensors : how many its files hold; a config that describes a model of far more is refused
    auto : a class with `from_config`; None: the class that the config names
    dtype : torch.dtype, optional
        None: the config's
    trust : whether code of the folder may run

    Raises
    ------
    SqCpuError
        For a config that transformers cannot read or build, whatever is wrong with it.
    """
    check_version()
    path = folder / CONFIG
    content = read_json(path)
    check_counts(content, tensors, path)
    if isinstance(content, dict) and "model_type" not in content and auto is None:
        raise _foreign(str(content.get("architectures")).strip("[]'"), folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if not trust:
            check_no_kernels(config, path)
        dtype = dtype or config.dtype
        with _bounded(tensors, path):
            if auto is not None:
                return bare_model(lambda: auto.from_config(config, dtype=dtype))
            named = _model_class(config, folder, trust)
            return bare_model(lambda: from_config(named, config, dtype))
    except SqCpuError:
        raise
    except Exception as error:  # a config may be wrong in any way, and raise anything
        if not trust and isinstance(content, dict) and "auto_map" in content:
            raise SqCpuError(f"{path}: {UNTRUSTED}") from error
        raise SqCpuError(
            f"{path}: transformers {transformers.__version__} cannot build this model "
            f"({first_line(error)}); check architectures and upgrade transformers"
        ) from error


def check_no_kernels(config: Any, where: object) -> None:
    """Raise `SqCpuError` for a config that has transformers fetch a kernel from the hub."""
    if names := hub_kernels(config):
        raise SqCpuError(
            f"{where} asks for a kernel of the hub, {names[0]} (attn_implementation): code, "
            "which is not run: remove that line, or give trust_remote_code=True "
            "(--trust-remote-code)"
        )


def _model_class(config: Any, folder: Path, trust: bool) -> Any:
    """Return the class that a config names: of transformers or, if trusted, of the folder."""
    found = named_class(config, folder, trust)
    if found is not None:
        return found
    untrusted = getattr(config, "auto_map", None) and not trust
    raise _foreign(config.architectures[0], folder, f"; or, as {UNTRUSTED}" if untrusted else "")


def _foreign(name: str, folder: Path, otherwise: str = "") -> SqCpuError:
    return SqCpuError(
        f"{folder} holds a {name}, which transformers cannot build: give a fresh one to fill, "
        f"sq_cpu.load(path, model={name}(...)){otherwise}"
    )


def check_counts(content: Any, tensors: int, path: Path) -> None:
    """Raise `SqCpuError` for a config with counts that no model of so few tensors has.

    A config that says 10^12 layers would be followed for days, tensor or no tensor.
    """
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key != "quantization_config"}
    nodes = [("", content)]
    while nodes:
        key, value = nodes.pop()
        if isinstance(value, dict):
            nodes += [(str(name), child) for name, child in value.items()]
        elif isinstance(value, list):
            nodes += [(key, child) for child in value]
        elif isinstance(value, int):
            most = _MANY if _COUNTS.search(key) else None
            most = tensors + _FEW if _MODULES.search(key) else most
            most = _LABELS if key == "num_labels" else most
            if most is not None and value > most:
                raise SqCpuError(
                    f"{path}: {key} is {str(value)[:20]}, but the files hold {tensors} tensors; "
                    "copy the checkpoint again"
                )


@contextmanager
def _bounded(tensors: int, path: Path) -> Iterator[None]:
    """Stop a constructor that makes far more modules than a model of so many tensors has."""
    left = 10_000 + 100 * tensors
    thread = threading.get_ident()

    def count(*_: object) -> None:
        nonlocal left
        if threading.get_ident() == thread:
            left -= 1
            if left < 0:
                raise SqCpuError(
                    f"{path} describes a far larger model than the {tensors} tensors of its files; "
                    "copy the checkpoint again"
                )

    handles = [
        registration.register_module_module_registration_hook(count),
        registration.register_module_parameter_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_buffers(model: nn.Module, nbytes: int, path: Path) -> None:
    """Raise `SqCpuError` where the buffers to compute are far larger than files of `nbytes`."""
    needed = sum(buffer.nbytes for buffer in unsaved_buffers(model).values())
    if needed > nbytes + _SPARE:
        raise SqCpuError(
            f"{path} describes buffers of {needed >> 20} MB, the files have {nbytes >> 20} MB; "
            "copy the checkpoint again"
        )
