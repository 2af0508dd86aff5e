from . import texts as texts
from .analysis.analysis import Analysis as Analysis
from .analysis.analysis import analyze as analyze
from .analysis.report import report as report
from .analysis.saturation import Saturation as Saturation
from .analysis.saturation import SaturationCount as SaturationCount
from .analysis.saturation import count_saturation as count_saturation
from .autotuning.autotune import Autotuned as Autotuned
from .autotuning.autotune import autotune as autotune
from .autotuning.configurations import SearchSpace as SearchSpace
from .calibration.calibrate import calibrate as calibrate
from .calibration.calibration import Calibration as Calibration
from .checkpoint.checkpoint import load as load
from .checkpoint.checkpoint import save as save
from .errors import SqCpuError as SqCpuError
from .evaluation.lm_eval import lm_eval_accuracy as lm_eval_accuracy
from .evaluation.perplexity import TextPerplexity as TextPerplexity
from .evaluation.perplexity import perplexity as perplexity
from .evaluation.perplexity import token_windows as token_windows
from .kernels import attention as attention
from .kernels.ops import QuantizedActivation as QuantizedActivation
from .kernels.runtime import isa as isa
from .models.families import register_family as register_family
from .models.family import Family as Family
from .models.family import Group as Group
from .models.family import Stack as Stack
from .nn.linear import QuantLinear as QuantLinear
from .quantization.quantize import quantize as quantize
from .scheme import Scheme as Scheme
from .smoothing.plan import GroupPlan as GroupPlan
from .smoothing.plan import LayerPlan as LayerPlan
from .smoothing.plan import SmoothPlan as SmoothPlan
from .streaming.streaming import QuantizedCheckpoint as QuantizedCheckpoint
from .streaming.streaming import quantize_checkpoint as quantize_checkpoint
from .tuning.tune import tune as tune

__version__: str
__all__: list[str]
