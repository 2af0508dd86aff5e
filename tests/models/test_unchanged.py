"""A model that calibrate and quantize have called is as it was, whatever its forward changes."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import inputs, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig

import sq_cpu
from sq_cpu.models.unchanged import checksum, unchanged


class Remembering(nn.Module):
    """A linear behind a norm, with much that a forward could change."""

    def __init__(self, change: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.norm, self.linear, self.spare = nn.LayerNorm(8), nn.Linear(8, 8), nn.Identity()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("wide", torch.zeros(1).expand(8))
        self.register_buffer("nan", torch.full((3,), torch.nan))
        self.steps, self.text, self.cached = 0, "first", None
        self.plain = torch.ones(3)
        self.seen: list[Any] = []
        self.nested = {"a": [1, {"b": 2}], "t": (torch.zeros(2), [0])}
        self.recent: deque[int] = deque(maxlen=3)
        self.names = {"one"}
        self.ordered = OrderedDict(x=1, y=2)
        self.config = SimpleNamespace(attention="sparse", inner=SimpleNamespace(depth=1))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x)
        y: Tensor = self.linear(self.norm(x))
        return y


def _grow_nested(model: Any, _: Tensor) -> None:
    model.nested["a"][1]["b"] += 1
    model.nested["new"] = 1
    model.nested["t"][0].add_(1)
    model.nested["t"][1].append(1)


CHANGES: dict[str, Callable[[Any, Tensor], object]] = {
    "number": lambda model, _: setattr(model, "steps", model.steps + 1),
    "text": lambda model, _: setattr(model, "text", "second"),
    "new_attribute": lambda model, x: setattr(model, "extra", x),
    "deleted_attribute": lambda model, _: vars(model).pop("text", None),
    "cache": lambda model, x: setattr(model, "cached", x.clone()),
    "buffer_in_place": lambda model, x: model.mean.mul_(0.9).add_(x.reshape(-1, 8).mean(0)),
    "buffer_replaced": lambda model, x: setattr(model, "mean", x.reshape(-1, 8)[0]),
    "buffer_added": lambda model, x: model.register_buffer("other", x),
    "buffer_resized": lambda model, _: model.mean.resize_(4),
    "plain_tensor": lambda model, _: model.plain.add_(1),
    "list": lambda model, x: model.seen.append(x),
    "nested": _grow_nested,
    "deque": lambda model, _: model.recent.append(1),
    "set": lambda model, _: model.names.add("two"),
    "order": lambda model, _: model.ordered.move_to_end("x"),
    "config": lambda model, _: setattr(model.config, "attention", "full"),
    "inner_config": lambda model, _: setattr(model.config.inner, "depth", 2),
    "submodule": lambda model, _: setattr(model, "spare", nn.ReLU()),
    "submodule_added": lambda model, _: model.add_module("later", nn.ReLU()),
    "hook": lambda model, _: model.spare.register_forward_hook(lambda *_: None),
    "training": lambda model, _: model.train(),
    "torch_random": lambda *_: torch.rand(3),
    "python_random": lambda *_: random.random(),
    "numpy_random": lambda *_: np.random.seed(3),
}


def described(value: Any) -> Any:
    """Give what a value holds, tensors by their contents, for a comparison."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), repr(value.detach().tolist())
    if isinstance(value, nn.Module):
        return type(value).__name__, described(vars(value))
    if isinstance(value, dict):
        return [(str(key), described(held)) for key, held in value.items()]
    if isinstance(value, list | tuple | deque):
        return [described(held) for held in value]
    if hasattr(value, "__dict__") and not callable(value):
        return described(vars(value))
    return repr(value)


def state_of(model: nn.Module) -> Any:
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    return described(model), described(generators)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_forward_changes_is_put_back(change: str) -> None:
    torch.manual_seed(0)
    model = Remembering(CHANGES[change])
    model.norm.eval()  # in training but for this
    x = [torch.randn(2, 5, 8) for _ in range(3)]
    before = state_of(model)
    sq_cpu.calibrate(model, x, ignore=())
    assert state_of(model) == before
    with unchanged(model):
        model(x[0])
        assert state_of(model) != before
    assert state_of(model) == before
    sq_cpu.calibrate(model, x, ignore=(), gradient_rows=4)
    assert state_of(model) == before


def test_a_failing_call_puts_back_too() -> None:
    def fail(model: Any, _: Tensor) -> None:
        model.steps += 1
        raise ValueError("no")

    model = Remembering(fail)
    with pytest.raises(ValueError, match="no"):
        sq_cpu.calibrate(model, [torch.randn(2, 8)], ignore=())
    assert model.steps == 0


@pytest.mark.parametrize("write", ["data", "in_place", "replaced"])
def test_a_module_that_rescales_its_weights_once_does_not_forget_that_it_did(write: str) -> None:
    def rescale(model: Any, _: Tensor) -> None:
        if model.steps:
            return
        model.steps = 1
        weight = model.linear.weight
        if write == "data":
            weight.data.mul_(0.5)
        elif write == "in_place":
            weight.mul_(0.5)
        else:
            model.linear.weight = nn.Parameter(weight.detach() * 0.5)

    model = Remembering(rescale).eval()
    x = torch.randn(2, 8)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    sq_cpu.calibrate(model, [x], ignore=())
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)


def test_a_checksum_sees_any_dtype_and_shape() -> None:
    for shape in ((), (1,), (7,), (9, 3), (2, 3, 4), (0, 3)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            weight = torch.randn(shape).to(dtype)
            assert checksum(weight) == checksum(weight.clone())
            assert not weight.numel() or checksum(weight) != checksum(weight + 1)


def test_big_bird_keeps_its_sparse_attention() -> None:
    config = AutoConfig.for_model(
        "big_bird",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=256,
        block_size=8,
        num_random_blocks=1,
        attention_type="block_sparse",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        sep_token_id=3,
    )
    torch.manual_seed(0)
    model = transformers.BigBirdForMaskedLM(config).eval()
    short, long = torch.randint(64, (2, 20)), torch.randint(64, (2, 128))
    before = state_of(model)
    with torch.no_grad():
        expected = model(long).logits
    assert state_of(model) == before
    calibration = sq_cpu.calibrate(model, [short, long])  # the first switches it off
    assert state_of(model) == before
    sq_cpu.quantize(model, calibration)
    assert model.bert.attention_type == "block_sparse"
    with torch.no_grad():
        found = model(long).logits
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "whisper", "gemma3", "opt"])
def test_transformers_models_are_as_they_were(name: str) -> None:
    model = tiny_model(name)
    before, parameters = state_of(model), dict(model.named_parameters())
    sq_cpu.calibrate(model, inputs(name), gradient_rows=4)
    assert state_of(model) == before
    assert all(parameters[n] is parameter for n, parameter in model.named_parameters())


class Counts(nn.Module):
    """Counts its calls in a view of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(3))
        self.first = self.cache[0]

    def forward(self, x: Tensor) -> Tensor:
        self.first.add_(1)
        return x + self.cache[0]


def test_views_stay_views() -> None:
    model = Counts()
    with unchanged(model):
        model(torch.ones(1))
    assert torch.equal(model.cache, torch.zeros(3))
    assert model(torch.ones(1)) == 2
