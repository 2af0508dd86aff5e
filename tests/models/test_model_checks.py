"""What no verb can work with: each refuses it at once, in one line, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from byte_models import byte_model, byte_tokenizer
from tiny import batches, tiny_model
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils.parametrizations import weight_norm

import sq_cpu
from sq_cpu.analysis.analysis import analyze
from sq_cpu.calibration.calibrate import Calibration, calibrate
from sq_cpu.errors import SqCpuError
from sq_cpu.quantization.quantize import quantize
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import SmoothPlan
from sq_cpu.tuning.tune import tune


class Foreign(Tensor):
    """A weight as other tools keep theirs: a subclass that holds codes."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(str(func))


def _compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def _compiled_in_place(model: Any) -> Any:
    model.model.layers[1].compile(backend="eager")
    return model


def _offloaded(model: Any) -> Any:
    accelerate.cpu_offload(model.model.layers[0])
    return model


def _partly_meta(model: Any) -> Any:
    model.model.layers[1].mlp.to("meta")
    return model


def _foreign(model: Any) -> Any:
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(Foreign(torch.zeros(48, 32, dtype=torch.int8)), False)
    return model


def _distributed(model: Any) -> Any:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        linear = model.model.layers[0].mlp.up_proj
        mesh = init_device_mesh("cpu", (1,))
        linear.weight = nn.Parameter(distribute_tensor(linear.weight, mesh, [Shard(0)]), False)
    finally:
        distributed.destroy_process_group()
    return model


def _traced(_: Any) -> Any:
    with pytest.deprecated_call():
        return torch.jit.trace(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3))


def _lazy(_: Any) -> Any:
    return nn.Sequential(nn.LazyLinear(3))


def _sparse(model: Any) -> Any:
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse(), False)
    return model


def _of_another_tool(model: Any) -> Any:
    model.hf_quantizer = object()
    model.config.quantization_config = SimpleNamespace(quant_method="bitsandbytes")
    return model


def _quantized(model: Any) -> Any:
    return quantize(model, scheme="O1", smooth=False)


def _one_in_double(model: Any) -> Any:
    model.model.layers[1].mlp.down_proj.double()
    return model


MODELS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "path": (lambda _: "model/", r"the model is a str, not a torch.nn.Module: load it"),
    "compiled": (_compiled, r"the model \(OptimizedModule\) is compiled, .*: give the model as it"),
    "in_place": (_compiled_in_place, r"model.layers.1 \(LlamaDecoderLayer\) is compiled"),
    "traced": (_traced, r"the model \(TopLevelTracedModule\) is compiled"),
    "lazy": (_lazy, "0.weight has no shape yet: call the model once"),
    "offloaded": (
        _offloaded,
        r"model.layers.0.self_attn.q_proj.weight is on the meta device .*load",
    ),
    "meta": (_partly_meta, r"model.layers.1.mlp.gate_proj.weight is on the meta device .*load"),
    "quantized": (_quantized, "the model is quantized already; start from its float weights"),
    "of_another_tool": (
        _of_another_tool,
        r"quantized already \(.*'bitsandbytes'\); load",
    ),
}
WEIGHTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "float64": (lambda model: model.double(), r"q_proj.weight is float64; .*model.float\(\)"),
    "one_in_double": (_one_in_double, r"1.mlp.down_proj.weight is float64; .*ignore this linear"),
    "foreign": (
        _foreign,
        r"up_proj.weight is a .*Foreign .*, no plain tensor: .*ignore this linear",
    ),
    "sparse": (_sparse, r"up_proj.weight is a .*Parameter \(torch.sparse_coo\), no plain tensor"),
    "sharded": (_distributed, r"up_proj.weight is a .*DTensor .*, no plain tensor"),
}


def _verbs(found: Calibration) -> dict[str, Callable[[Any], Any]]:
    return {
        "calibrate": lambda model: calibrate(model, batches()),
        "tune": lambda model: tune(model, found),
        "uniform": lambda model: SmoothPlan.uniform(model, found),
        "quantize": lambda model: quantize(model, found),
        "naive": lambda model: quantize(model, smooth=False),
        "analyze": lambda model: analyze(model, found),
        "autotune": lambda model: sq_cpu.autotune(model, batches(), lambda _: 1.0),
    }


@pytest.fixture(scope="module")
def found() -> Calibration:
    return calibrate(tiny_model("llama"), batches())


def _refuse(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(SqCpuError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb", ["calibrate", "tune", "uniform", "quantize", "naive", "analyze"])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_refused_by_every_verb(name: str, verb: str, found: Calibration) -> None:
    make, message = MODELS[name]
    _refuse(message, partial(_verbs(found)[verb], make(tiny_model("llama"))))


@pytest.mark.parametrize("name", ["compiled", "offloaded"])
def test_autotune_refuses_them_too(name: str, found: Calibration) -> None:
    make, message = MODELS[name]
    _refuse(message, partial(_verbs(found)["autotune"], make(tiny_model("llama"))))


@pytest.mark.parametrize("verb", ["calibrate", "naive"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_refused_unless_ignored(name: str, verb: str, found: Calibration) -> None:
    make, message = WEIGHTS[name]
    model = make(tiny_model("llama"))
    _refuse(message, partial(_verbs(found)[verb], model))
    if name == "one_in_double":
        ignore = ("lm_head", "1.mlp.down_proj")
        model.model.layers[1].mlp.down_proj.forward = lambda x: x.new_zeros(*x.shape[:-1], 32)
        assert (
            "model.layers.1.mlp.down_proj"
            not in calibrate(model, batches(), ignore=ignore).channel_min
        )
        quantize(model, scheme=Scheme(ignore=ignore), smooth=False)


@pytest.mark.parametrize(
    "wrong", ["calibration.safetensors", {"channel_min": {}}, batches(), 3], ids=type
)
@pytest.mark.parametrize("verb", ["tune", "uniform", "quantize", "analyze"])
def test_what_is_no_calibration_is_refused(verb: str, wrong: Any) -> None:
    message = f"calibration is a {type(wrong).__name__}, not a Calibration: make one with calibrate"
    _refuse(message, partial(_verbs(wrong)[verb], tiny_model("llama")))


@pytest.mark.parametrize(
    "wrong", [Path("batches"), "batches", None, 3, batches()[0], {"a": 1}], ids=type
)
def test_what_are_no_batches_is_refused(wrong: Any) -> None:
    message = (
        rf"batches is one {type(wrong).__name__}; pass an iterable of batches, as in \[batch\]"
    )
    _refuse(message, lambda: calibrate(tiny_model("llama"), wrong))


@pytest.mark.parametrize(
    "batch",
    [
        {"unknown": batches()[0]},
        {"attention_mask": batches()[0]},
        (batches()[0], batches()[0], batches()[0], 1, 2, 3, 4, 5, 6, 7, 8, 9),
        batches()[0].float(),
        batches()[0][0],
    ],
)
def test_a_batch_that_the_forward_does_not_take_is_named(batch: Any) -> None:
    model = tiny_model("llama")
    _refuse(
        r"calibration batch 1: the model's forward fails \(.*\); give it what model\(...\) takes"
        "|tokenize with the model's own",
        lambda: calibrate(model, [batches()[0], batch]),
    )
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_names_to_ignore_come_in_a_tuple() -> None:
    _refuse(
        r"ignore is 'down_proj', not a tuple of names: use \('down_proj',\)",
        lambda: calibrate(tiny_model("llama"), batches(), ignore="down_proj"),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "bert", "gemma3_text", "t5"])
@pytest.mark.parametrize("bad", [64, 1000, -1])
def test_ids_that_the_model_has_no_embedding_for_are_refused(model_type: str, bad: int) -> None:
    model, (good, ids) = tiny_model(model_type), batches(2)
    ids[1, 3] = bad
    named = r"none of the 64 rows of .*: tokenize with the model's own tokenizer"
    given = {"decoder_input_ids": good} if model_type == "t5" else {}
    _refuse(f"id {bad} is {named}", lambda: calibrate(model, [{"input_ids": ids, **given}]))
    calibrate(model, [{"input_ids": good, **given}])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_perplexity_refuses_the_ids_of_another_tokenizer() -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    text = "Some text to score. " * 20
    assert sq_cpu.perplexity(model, tokenizer, text, window=16, windows=2) > 0
    model.resize_token_embeddings(40)
    with pytest.raises(SqCpuError, match=r"none of the 40 rows of the model's embeddings"):
        sq_cpu.perplexity(model, tokenizer, text, window=16, windows=2)


# --- what was put onto a linear -------------------------------------------------------------------


class Lora(nn.Module):
    """As peft's: the base layer, and what merges into it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    def unmerge(self) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * 2  # type: ignore[no-any-return]


def _replaced_forward(mlp: Any) -> None:
    linear = mlp.up_proj
    forward = linear.forward
    linear.forward = lambda x: forward(x) * 2


def _accelerated(mlp: Any) -> None:
    accelerate.hooks.add_hook_to_module(mlp.up_proj, accelerate.hooks.ModelHook())


def _adapted(mlp: Any) -> None:
    mlp.up_proj = Lora(mlp.up_proj)


ADDITIONS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "forward": (_replaced_forward, "up_proj", r"up_proj has a forward of its own .*: remove it"),
    "accelerate": (_accelerated, "up_proj", "remove_hook_from_module does, or ignore it"),
    "hook": (
        lambda mlp: mlp.up_proj.register_forward_hook(lambda *_: None),
        "up_proj",
        "up_proj has forward hooks, which int8 would lose: remove them, or ignore it",
    ),
    "parametrization": (
        lambda mlp: weight_norm(mlp.up_proj),
        "up_proj",
        "up_proj is parametrized, which int8 would lose: remove_parametrizations, or ignore it",
    ),
    "adapter": (_adapted, "up_proj", r"up_proj.base_layer has an adapter beside it: merge that"),
}


@pytest.mark.parametrize("scheme", ["O1", "O3"])
@pytest.mark.parametrize("name", ADDITIONS)
def test_what_was_put_onto_a_linear_is_refused_unless_ignored(name: str, scheme: str) -> None:
    add, ignored, message = ADDITIONS[name]
    model = tiny_model("llama")
    add(model.model.layers[1].mlp)
    found = calibrate(model, batches())
    _refuse(message, lambda: quantize(model, found, scheme=scheme))
    ignore = ("lm_head", f"1.mlp.{ignored}")
    record: Any = quantize(model, found, scheme=Scheme.of(scheme, ignore=ignore)).sq_cpu_config
    assert not any(f"1.mlp.{ignored}" in name for name in record.layers)
    with torch.no_grad():
        assert model(batches()[0]).logits.isfinite().all()


@pytest.mark.parametrize("scheme", ["O1", "O3"])
def test_a_subclass_with_a_forward_of_its_own_stays_in_float(scheme: str) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    model = nn.Sequential(nn.Linear(6, 6), Doubled(6, 6))
    record: Any = quantize(
        model, calibrate(model, [torch.randn(8, 6)]), scheme=scheme
    ).sq_cpu_config
    assert record.kept == {"1": "a Doubled, which may compute something else"}


@pytest.mark.parametrize("scheme", ["O1", "O2", "O3"])
def test_models_may_call_their_linears_by_keyword(scheme: str) -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(input=self.first(input=x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = ByKeyword(), torch.randn(8, 6)
    before = model(x).detach()
    for plan in (None, SmoothPlan(())):
        one = quantize(copy.deepcopy(model), calibrate(model, [x]), plan, scheme=scheme)
        assert (one(x) - before).norm() < 0.05 * before.norm()
