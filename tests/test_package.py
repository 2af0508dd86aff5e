"""The package as a whole: what importing it costs and brings, and that names stay what they are."""

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import sq_cpu
from sq_cpu import SqCpuError
from sq_cpu.extras import require

LAZY = ("jinja2", "matplotlib", "optuna", "transformers")
# Added to, never taken from.
PUBLIC = [
    "Analysis",
    "Autotuned",
    "Calibration",
    "Decoder",
    "Drift",
    "Family",
    "Group",
    "GroupPlan",
    "Int8Cache",
    "KvReport",
    "LayerPlan",
    "Learned",
    "PickedScheme",
    "Prefix",
    "QuantLinear",
    "QuantizedActivation",
    "QuantizedCheckpoint",
    "Request",
    "RowCounts",
    "Sampling",
    "Saturation",
    "SaturationCount",
    "Scheduler",
    "Scheme",
    "SearchSpace",
    "SmoothPlan",
    "SqCpuConfig",
    "SqCpuError",
    "Stack",
    "TextPerplexity",
    "Token",
    "analyze",
    "attention",
    "autotune",
    "calibrate",
    "count_saturation",
    "decoding_loop",
    "drift",
    "fuse",
    "generate",
    "generate_batch",
    "isa",
    "lead_with",
    "leading_ids",
    "learn",
    "lm_eval_accuracy",
    "load",
    "make_prefix",
    "measure_kv",
    "outlier_tokens",
    "perplexity",
    "pick_scheme",
    "plan_from_qconf",
    "prefix_of",
    "quantize",
    "quantize_checkpoint",
    "register_family",
    "report",
    "row_counts",
    "save",
    "texts",
    "token_windows",
    "tune",
    "use_int8_attention",
    "use_prefix",
    "with_int8_layers",
]


def python(program: str) -> str:
    """Run a program in a fresh interpreter; return what it prints."""
    return subprocess.check_output([sys.executable, "-c", program], text=True).strip()


def rooms() -> list[ModuleType]:
    found = pkgutil.walk_packages(sq_cpu.__path__, "sq_cpu.")
    return [sq_cpu, *(importlib.import_module(info.name) for info in found if info.ispkg)]


def test_no_name_hides_a_module() -> None:
    for room in rooms():
        for info in pkgutil.iter_modules(room.__path__):
            try:
                module = importlib.import_module(f"{room.__name__}.{info.name}")
            except ModuleNotFoundError as error:  # scripts/vllm has an environment of its own
                if (error.name or "").partition(".")[0] != "vllm":
                    raise
                continue
            assert getattr(room, info.name) is module


def test_every_public_name_is_there() -> None:
    assert set(sq_cpu.__all__) == set(PUBLIC)
    for name in PUBLIC:
        assert getattr(sq_cpu, name).__name__.rpartition(".")[2] == name
    assert not hasattr(sq_cpu, "nothing")


def test_importing_it_imports_little_and_the_torch_operator() -> None:
    program = f"import sys, sq_cpu, torch; print([m for m in {LAZY} if m in sys.modules])"
    assert python(f"{program}; print(torch.ops.sq_cpu.linear)") == "[]\nsq_cpu.linear"


@pytest.mark.parametrize(
    "imports",
    [
        "sq_cpu; from transformers import AutoModelForCausalLM",
        "transformers.quantizers, sq_cpu",
        "sq_cpu, transformers.modeling_utils",
    ],
)
def test_transformers_knows_our_names_whichever_is_imported_first(imports: str) -> None:
    program = f"""import {imports}
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
registries = AUTO_QUANTIZER_MAPPING, AttentionInterface(), AttentionMaskInterface()
print(["sq_cpu" in registry for registry in registries])"""
    assert python(program) == "[True, True, True]"


def test_a_missing_optional_dependency_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require("torch", "tune")
    monkeypatch.setitem(sys.modules, "optuna", None)
    for module in ("optuna", "no_such_module"):
        with pytest.raises(SqCpuError, match=rf"^{module} is .* pip install 'sq_cpu\[tune\]'$"):
            require(module, "tune")
