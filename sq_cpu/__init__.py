"""SmoothQuant for Xeon: int8 weights and int8 activations on AVX-512 VNNI and AMX.

calibrate -> smooth -> tune -> quantize -> save -> load -> run; the README shows the whole way.
"""

from importlib.metadata import version as _version

import torch as _torch  # noqa: F401  first: the extension uses the OpenMP runtime that torch loads

from sq_cpu import transformers_plugin as _transformers_plugin  # noqa: F401  registers itself
from sq_cpu.analysis import Analysis, analyze
from sq_cpu.autotune import Autotuned, autotune
from sq_cpu.calibrate import calibrate
from sq_cpu.calibration import Calibration
from sq_cpu.checkpoint import load, save
from sq_cpu.configurations import SearchSpace
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluate import perplexity
from sq_cpu.families import Family, Group, Stack, register_family
from sq_cpu.linear import QuantLinear
from sq_cpu.lm_harness import lm_eval_accuracy
from sq_cpu.ops import QuantizedActivation
from sq_cpu.plan import GroupPlan, LayerPlan, SmoothPlan
from sq_cpu.quantize import quantize
from sq_cpu.report import report
from sq_cpu.runtime import isa
from sq_cpu.saturation import Saturation, SaturationCount, count_saturation
from sq_cpu.scheme import Scheme
from sq_cpu.streaming import QuantizedCheckpoint, quantize_checkpoint
from sq_cpu.tune import tune

__version__ = _version("sq_cpu")

__all__ = [
    "Analysis",
    "Autotuned",
    "Calibration",
    "Family",
    "Group",
    "GroupPlan",
    "LayerPlan",
    "QuantLinear",
    "QuantizedActivation",
    "QuantizedCheckpoint",
    "Saturation",
    "SaturationCount",
    "Scheme",
    "SearchSpace",
    "SmoothPlan",
    "SqCpuError",
    "Stack",
    "analyze",
    "autotune",
    "calibrate",
    "count_saturation",
    "isa",
    "lm_eval_accuracy",
    "load",
    "perplexity",
    "quantize",
    "quantize_checkpoint",
    "register_family",
    "report",
    "save",
    "tune",
]
