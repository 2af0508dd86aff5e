"""Models from where people keep them: a folder, a checkpoint of ours, a GGUF file or the hub."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from sq_cpu.checkpoint.config import CONFIG
from sq_cpu.checkpoint.kinds import is_for_floats, is_int8, quantization_of
from sq_cpu.checkpoint.load import load, load_floats
from sq_cpu.checkpoint.skeleton import UNTRUSTED, check_no_kernels
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.extras import require
from sq_cpu.models.hf_private import forget_quantization
from sq_cpu.parsing import read_json

__all__ = ["check_causal", "check_float", "is_checkpoint", "load_source", "load_tokenizer"]

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
    path = Path(os.path.expanduser(source))
    if say is None:
        return _load_source(source, path, dtype, trust_remote_code)
    floats = ", its weights made floats, its inputs in float" if is_for_floats(path) else ""
    say(f"loading {source}{floats}")
    # The GGUF reader's bar cannot be turned off, and the hub client prints its retries.
    with contextlib.redirect_stderr(io.StringIO()):
        return _load_source(source, path, dtype, trust_remote_code)


def _load_source(
    source: str | Path, path: Path, dtype: torch.dtype | None, trust: bool
) -> tuple[nn.Module, Any]:
    if path.is_dir():
        check_causal(path)
        if is_checkpoint(path):
            model = load(path, dtype=dtype, trust_remote_code=trust)
            return model, load_tokenizer(path, f"checkpoint {path}", trust)
        if is_for_floats(path):
            model = load_floats(path, dtype=dtype, trust_remote_code=trust)
            return model, load_tokenizer(path, f"model folder {path}", trust)
        check_float(path)
        return _load(path, dtype or "auto", f"model folder {path}", trust)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SqCpuError(f"{path} is a file, but not a .gguf; give the model's folder instead")
        return _load_gguf(path, dtype or torch.float32)
    if path.suffix.lower() != ".gguf" and _HUB_NAME.fullmatch(str(source)):
        return _load(source, dtype or "auto", f"{source} (no such folder) from the hub", trust)
    raise SqCpuError(f"{source}: no such file or folder; give a model folder or a .gguf file")


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


def check_causal(folder: Path) -> None:
    """Raise `SqCpuError` for a folder whose model is an encoder, or has one.

    transformers would make a decoder of a BERT's weights, without a word.
    """
    config = _config(folder)
    kind = str(config.get("model_type"))
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    given = config.get("architectures")
    own = given[0] if isinstance(given, list) and given else causal or kind
    if kind not in CONFIG_MAPPING_NAMES or "auto_map" in config or own == causal:
        return
    if causal is None or kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise SqCpuError(
            f"{folder} holds a {own}, no causal language model: in Python, load it with its class, "
            "and give sq_cpu.calibrate batches of its own inputs"
        )


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
        raise SqCpuError(f"cannot load {what}: {_reason(error)}") from error
    if missing := sorted(report["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        raise SqCpuError(
            f"cannot load {what}: the weights lack {missing[0]} (and {len(missing) - 1} more); "
            "get the whole model"
        )
    return model.eval(), load_tokenizer(source, what, trust, **options)


def load_tokenizer(source: str | Path, what: str, trust: bool = False, **options: Any) -> Any:
    """Load the tokenizer of `what`, or raise `SqCpuError`; its own code runs if it is trusted."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust, **options)
    except Exception as error:
        raise SqCpuError(f"cannot load the tokenizer of {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    # What transformers says of it takes many lines and names an option of its own.
    return UNTRUSTED if "trust_remote_code" in str(error) else first_line(error)
