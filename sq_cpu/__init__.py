"""SmoothQuant for Xeon: int8 weights and int8 activations on AVX-512 VNNI and AMX.

calibrate -> smooth -> tune -> quantize -> save -> load -> run; the README shows the whole way.
"""

from importlib.metadata import version as _version

import torch as _torch  # noqa: F401  first: the extension uses the OpenMP runtime that torch loads

from sq_cpu.analysis.analysis import Analysis, analyze
from sq_cpu.analysis.report import report
from sq_cpu.analysis.saturation import Saturation, SaturationCount, count_saturation
from sq_cpu.autotuning.autotune import Autotuned, autotune
from sq_cpu.autotuning.configurations import SearchSpace
from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.calibration.calibration import Calibration
from sq_cpu.checkpoint import hf_quantizer as _transformers_plugin  # noqa: F401  registers itself
from sq_cpu.checkpoint.load import load
from sq_cpu.checkpoint.save import save
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.lm_eval import lm_eval_accuracy
from sq_cpu.evaluation.perplexity import perplexity
from sq_cpu.kernels.ops import QuantizedActivation
from sq_cpu.kernels.runtime import isa
from sq_cpu.models.families import register_family
from sq_cpu.models.family import Family, Group, Stack
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.quantization.quantize import quantize
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import GroupPlan, LayerPlan, SmoothPlan
from sq_cpu.streaming.streaming import QuantizedCheckpoint, quantize_checkpoint
from sq_cpu.tuning.tune import tune

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
