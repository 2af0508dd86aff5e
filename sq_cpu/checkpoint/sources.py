"""Models from where people keep them: a folder, a checkpoint of ours, a GGUF file or the hub."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from sq_cpu.checkpoint.classes import other_class, task_class
from sq_cpu.checkpoint.config import CONFIG
from sq_cpu.checkpoint.kinds import is_for_floats, is_int8, quantization_of
from sq_cpu.checkpoint.load import load, load_floats
from sq_cpu.checkpoint.preprocessors import Preprocessor, load_preprocessor, sentence_files
from sq_cpu.checkpoint.skeleton import UNTRUSTED, check_no_kernels, reason_of
from sq_cpu.errors import SqCpuError
from sq_cpu.extras import require
from sq_cpu.models.hf_private import forget_quantization
from sq_cpu.parsing import read_json

__all__ = [
    "check_causal",
    "check_float",
    "is_checkpoint",
    "is_no_language_model",
    "load_any",
    "load_source",
    "load_tokenizer",
]

_UNKNOWN = "transformers has no such class; upgrade it"
# "gpt2", "owner/name": what can be a repository on the hub.
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def load_source(
    source: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    trust_remote_code: bool = False,
    say: Callable[[str], object] | None = None,
) -> tuple[nn.Module, Any]:
    """Load a causal language model, quantized or not, and its tokenizer.

    Parameters
    ----------
    source : str or Path
        A folder that transformers wrote, a folder that :func:`sq_cpu.load` reads, a ``.gguf`` file
        (dequantized by transformers), or the name of a model on the hub. A compressed-tensors
        folder whose inputs are in float, or whose weights have scales for groups of input channels,
        is dequantized: its floats are exactly codes times scales.
    dtype : torch.dtype, optional
        fp32, bf16 or fp16. None keeps the dtype that the folder or the hub says; a GGUF file, whose
        weights have none, then becomes fp32.
    trust_remote_code : bool
        Run code that the folder or the hub brings for its model or tokenizer.
    say : callable, optional
        Told, in a line, what is loaded, in place of what the libraries print: the process's stderr
        is dropped meanwhile. None: stderr stays as it is.

    Returns
    -------
    model : transformers.PreTrainedModel
        In eval mode, on the CPU.
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    SqCpuError
        Nothing there, a damaged file, no causal language model, an architecture that transformers
        does not know, weights that lack a tensor, a hub that cannot be reached, or code that is not
        trusted.
    """
    return _said(source, say, lambda: _load_source(source, _path(source), dtype, trust_remote_code))


def load_any(
    source: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    trust_remote_code: bool = False,
    say: Callable[[str], object] | None = None,
) -> tuple[nn.Module, Any]:
    """Load a model of any class, quantized or not, and what prepares its inputs.

    The class is the one that config.json names, or what transformers maps the model's type to; of a
    folder of sentence-transformers that pools, the base model. The rest is as in `load_source`,
    which loads causal language models.

    Returns
    -------
    model : transformers.PreTrainedModel
        In eval mode, on the CPU.
    preprocessor : transformers.PreTrainedTokenizerBase or Preprocessor
        A tokenizer for a causal language model.

    Raises
    ------
    SqCpuError
        As `load_source` does, for a class that transformers does not have, and for files of a
        tokenizer, feature extractor or image processor that are not there.
    """
    if not is_no_language_model(source):
        return load_source(source, dtype=dtype, trust_remote_code=trust_remote_code, say=say)
    return _said(source, say, lambda: _load_other(source, dtype, trust_remote_code))


def _path(source: str | Path) -> Path:
    return Path(os.path.expanduser(source))


def _said(
    source: str | Path, say: Callable[[str], object] | None, load: Callable[[], tuple[Any, Any]]
) -> tuple[Any, Any]:
    if say is None:
        return load()
    floats = (
        ", its weights made floats, its inputs in float" if is_for_floats(_path(source)) else ""
    )
    say(f"loading {source}{floats}")
    # The GGUF reader's bar cannot be turned off, and the hub client prints its retries.
    with contextlib.redirect_stderr(io.StringIO()):
        return load()


def _load_source(
    source: str | Path, path: Path, dtype: torch.dtype | None, trust: bool
) -> tuple[nn.Module, Any]:
    if path.is_dir():
        check_causal(path)
        model = _of_integers(path, dtype, trust)
        if model is None:
            return _load(path, dtype or "auto", f"model folder {path}", trust)
        what = "checkpoint" if is_checkpoint(path) else "model folder"
        return model, load_tokenizer(path, f"{what} {path}", trust)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SqCpuError(f"{path} is a file, but not a .gguf; give the model's folder instead")
        return _load_gguf(path, dtype or torch.float32)
    if _is_hub_name(source):
        return _load(source, dtype or "auto", _hub(source), trust)
    raise SqCpuError(f"{source}: no such file or folder; give a model folder or a .gguf file")


def _of_integers(folder: Path, dtype: torch.dtype | None, trust: bool) -> Any:
    """Return a quantized folder's model, as integers or the floats they stand for; None: float."""
    if is_checkpoint(folder):
        return load(folder, dtype=dtype, trust_remote_code=trust)
    if is_for_floats(folder):
        return load_floats(folder, dtype=dtype, trust_remote_code=trust)
    check_float(folder)
    return None


def _is_hub_name(source: str | Path) -> bool:
    is_name = _HUB_NAME.fullmatch(str(source)) is not None
    return is_name and not str(source).lower().endswith(".gguf")


def _hub(source: str | Path) -> str:
    return f"{source} (no such folder) from the hub"


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder's config.json says that :func:`sq_cpu.load` reads it as it is."""
    return is_int8(folder)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG)
    except SqCpuError:
        return {}  # not there or not readable: what loads the model says so, with the reason
    return config if isinstance(config, dict) else {}


def check_float(folder: Path) -> None:
    """Raise `SqCpuError` for a folder whose model is quantized already."""
    settings = quantization_of(folder)
    if settings is not None:
        whole = ", or leave out --stream, for its integers stand for floats"
        raise SqCpuError(
            f"{folder} is already quantized ({settings['quant_method']}); give the model in fp32, "
            f"bf16 or fp16{whole if is_for_floats(folder) else ''}"
        )


def is_no_language_model(source: str | Path) -> bool:
    """Say whether a source's config is of an encoder, or of another model that takes no prompt.

    `SqCpuError` for a hub that cannot be reached.
    """
    path = _path(source)
    if path.exists() or not _is_hub_name(source):
        return _other_class(path) is not None
    what = _hub(source)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            found = cached_file(source, CONFIG)
            return _other_class(Path(str(found)).parent) is not None or bool(sentence_files(source))
    except SqCpuError:
        raise
    except Exception as error:
        raise SqCpuError(f"cannot load {what}: {reason_of(error)}") from error


def _other_class(folder: Path) -> str | None:
    """Return the class of a folder's model; None for a causal language model.

    One whose states sentence-transformers pools is none.
    """
    config = _config(folder)
    found = other_class(config)
    if found is None and folder.is_dir() and sentence_files(folder):
        return f"sentence encoder ({config.get('model_type')})"
    return found


def check_causal(folder: Path) -> None:
    """Raise `SqCpuError` for a folder whose model is no causal language model."""
    if (own := _other_class(folder)) is not None:
        raise SqCpuError(
            f"{folder} holds a {own}, no causal language model: sq-cpu quantize (without --stream) "
            "and tune take it, eval beside its float model (--source), and its own class runs it"
        )


def _load_other(
    source: str | Path, dtype: torch.dtype | None, trust: bool
) -> tuple[nn.Module, Preprocessor]:
    path = _path(source)
    is_folder = path.is_dir()
    place: str | Path = path if is_folder else source
    what = f"model folder {path}" if is_folder else _hub(source)
    model = _of_integers(path, dtype, trust) if is_folder else None
    companions = _sentence_files(place, what)
    if model is None:
        model = _load_model(place, dtype or "auto", what, trust, base=bool(companions))
    return model, load_preprocessor(place, model.main_input_name, companions, what, trust)


def _sentence_files(place: str | Path, what: str) -> dict[str, Path]:
    try:
        return sentence_files(place)
    except SqCpuError:
        raise
    except Exception as error:
        raise SqCpuError(f"cannot load {what}: {reason_of(error)}") from error


def _load_model(
    place: str | Path, dtype: torch.dtype | str, what: str, trust: bool, *, base: bool
) -> Any:
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust)
        if not trust:
            check_no_kernels(config, what)
        found = task_class(config, place, trust, base=base)
        if found is None:
            names = config.architectures
            reason = UNTRUSTED if getattr(config, "auto_map", None) else _UNKNOWN
            raise SqCpuError(f"cannot load {what}: {names[0] if names else 'its class'}: {reason}")
        return _whole(
            found.from_pretrained(place, dtype=dtype, output_loading_info=True), what
        ).eval()
    except SqCpuError:
        raise
    except Exception as error:  # files that are missing, damaged or unknown raise all kinds
        raise SqCpuError(f"cannot load {what}: {reason_of(error)}") from error


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SqCpuError(f"{path} is not a GGUF file: its first bytes are not 'GGUF'")
    require("gguf", "gguf")
    model, tokenizer = _load(path.parent, dtype, f"GGUF file {path}", False, gguf_file=path.name)
    # The weights are floats now, but the model still says "gguf", and so refuses save and .to().
    forget_quantization(model)
    return model, tokenizer


def _load(
    source: str | Path, dtype: torch.dtype | str, what: str, trust: bool, **options: Any
) -> tuple[Any, Any]:
    try:
        if not trust and "gguf_file" not in options:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            check_no_kernels(config, what)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, trust_remote_code=trust, **options
        )
    except SqCpuError:
        raise
    except Exception as error:  # files that are missing, damaged or unknown raise all kinds
        raise SqCpuError(f"cannot load {what}: {reason_of(error)}") from error
    _whole((model, report), what)
    return model.eval(), load_tokenizer(source, what, trust, **options)


def _whole(loaded: tuple[Any, Mapping[str, Any]], what: str) -> Any:
    """Return a model all of whose weights were there."""
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        raise SqCpuError(
            f"cannot load {what}: the weights lack {missing[0]} (and {len(missing) - 1} more); "
            "get the whole model"
        )
    return model


def load_tokenizer(source: str | Path, what: str, trust: bool = False, **options: Any) -> Any:
    """Load the tokenizer of `what`, or raise `SqCpuError`; its own code runs if it is trusted."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust, **options)
    except Exception as error:
        raise SqCpuError(f"cannot load the tokenizer of {what}: {reason_of(error)}") from error
