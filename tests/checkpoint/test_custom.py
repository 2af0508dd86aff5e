"""Models that transformers cannot build: saved as they are, and loaded into a fresh instance."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sameness import assert_to_rounding, digests
from tiny import batches, inputs, tiny_model
from tiny_checkpoints import fails
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sq_cpu
from sq_cpu import LayerPlan, Scheme, SmoothPlan


class Net(nn.Module):
    """Attention of torch, a recurrent layer, a tied head, buffers of both kinds, extra state."""

    def __init__(self, width: int = 24, vocabulary: int = 40) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.embedding = nn.Embedding(vocabulary, width)
        self.embedding.weight = self.head.weight
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)
            )
            for _ in range(2)
        )
        self.again = self.blocks[0]
        self.recurrent = nn.LSTM(width, width, batch_first=True)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("offset", torch.randn(width))
        self.register_buffer("phases", torch.randn(width), persistent=False)
        self.shift = torch.zeros(())

    def get_extra_state(self) -> Tensor:
        return self.shift

    def set_extra_state(self, state: Tensor) -> None:
        self.shift = state

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.phases.cos()
        for block in (*self.blocks, self.again):
            x = x + block(x)
        x, _ = self.recurrent(x)
        x = self.norm(x.mT).mT + self.offset + self.shift
        result: Tensor = self.head(x)
        return result


class Mine(LlamaForCausalLM):
    """A class derived from one of transformers."""


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model.shift = torch.tensor(0.25)
    with torch.no_grad():
        model.norm.running_mean.normal_()
    return model.eval()


def mine() -> Mine:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    return Mine(LlamaConfig(vocab_size=40, num_attention_heads=4, **sizes)).eval()


def wrapped() -> nn.Sequential:
    return nn.Sequential(tiny_model("gpt2", vocab_size=40))


MAKE: dict[str, Callable[[], nn.Module]] = {"net": net, "mine": mine, "wrapped": wrapped}


def output(model: Any) -> Tensor:
    with torch.no_grad():
        found: Any = model(batches(1)[0] % 40)
    return found if isinstance(found, Tensor) else found.logits  # type: ignore[no-any-return]


def assert_same(found: Any, expected: Any) -> None:
    assert digests(found) == digests(expected)
    assert_to_rounding(output(found), output(expected), next(expected.parameters()).dtype)


def quantized(name: str, scheme: str) -> Any:
    model = MAKE[name]()
    data = [ids % 40 for ids in batches()]
    calibration = sq_cpu.calibrate(model, data, ignore=(), progress=False)
    settings = Scheme.of(scheme, ignore=())
    plan = SmoothPlan.uniform(model, calibration, ignore=())
    linear = next(n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D"))
    plan = SmoothPlan(plan.groups, (LayerPlan(name=linear, outliers=(1, 3)),), settings)
    return sq_cpu.quantize(model, calibration, plan, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["O1", "O3"])
@pytest.mark.parametrize("name", MAKE)
def test_a_fresh_instance_is_filled(
    name: str, scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = quantized(name, scheme).to(dtype)
    folder = sq_cpu.save(model, tmp_path / "out")
    with torch.device("meta"):
        bare = MAKE[name]()
    for fresh in (MAKE[name](), bare, MAKE[name]().train().requires_grad_()):
        loaded = sq_cpu.load(folder, model=fresh)
        assert loaded is fresh
        assert_same(loaded, model)
        assert loaded.sq_cpu_config == model.sq_cpu_config
        assert not loaded.training
        tensors = [*loaded.parameters(), *loaded.buffers()]
        assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
    again = sq_cpu.save(loaded, tmp_path / "again")
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


class Sharing(nn.Module):
    """Buffers of both kinds that share memory, with one another and with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        table = torch.randn(4, 8)
        self.register_buffer("row", table[0], persistent=False)
        self.register_buffer("same_row", table[0], persistent=False)
        self.register_buffer("rest", table[1:].mT)
        self.register_buffer("bias", self.second.bias.data, persistent=False)
        self.register_buffer("half_bias", self.second.bias.data[:4])

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x + self.row) * self.same_row)
        return x + (x @ self.rest).sum() + self.bias + self.half_bias.sum()


@pytest.mark.parametrize("max_shard_size", ["5GB", 200])
def test_what_shares_memory_is_stored_by_itself(tmp_path: Path, max_shard_size: Any) -> None:
    model = sq_cpu.quantize(Sharing(), scheme=Scheme(ignore=("second",)), smooth=False)
    folder = sq_cpu.save(model, tmp_path / "out", max_shard_size=max_shard_size)
    loaded = sq_cpu.load(folder, model=Sharing())
    assert digests(loaded) == digests(model)
    x = torch.randn(3, 8)
    torch.testing.assert_close(loaded(x), model(x))  # strides, and so sums, may differ


def test_what_is_tied_is_stored_once_and_tied_again(tmp_path: Path) -> None:
    model: Any = sq_cpu.quantize(net(), scheme=Scheme(ignore=("head",)), smooth=False)
    folder = sq_cpu.save(model, tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    assert "embedding.weight" not in stored
    assert torch.equal(stored["_extra_state"], torch.tensor(0.25))
    loaded: Any = sq_cpu.load(folder, model=Net())
    assert loaded.embedding.weight is loaded.head.weight
    assert loaded.again is loaded.blocks[0]
    assert torch.equal(loaded.phases, model.phases)
    assert_same(loaded, model)


def test_fresh_process(tmp_path: Path) -> None:
    model = quantized("net", "O3")
    folder = sq_cpu.save(model, tmp_path / "out")
    script = f"""
import json, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_custom import Net
from sameness import digests
import sq_cpu
print(json.dumps(digests(sq_cpu.load({str(folder)!r}, model=Net()))))
"""
    found = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE)
    assert json.loads(found.stdout) == digests(model)


def test_models_of_transformers_fill_a_given_instance_too(tmp_path: Path) -> None:
    model = tiny_model("t5")
    sq_cpu.quantize(model, sq_cpu.calibrate(model, inputs("t5"), progress=False), scheme="O3")
    folder = sq_cpu.save(model, tmp_path / "out")
    loaded = sq_cpu.load(folder, model=tiny_model("t5", seed=7))
    assert digests(loaded) == digests(model)


def test_what_is_refused(tmp_path: Path) -> None:
    model = quantized("net", "O1")
    folder = sq_cpu.save(model, tmp_path / "out")
    fails(r"holds a Net, which transformers cannot build.*model=Net\(", sq_cpu.load, folder)
    fails("holds a Net, but model is a Mine", sq_cpu.load, folder, model=mine())
    fails("quantized already: give a fresh", sq_cpu.load, folder, model=copy.deepcopy(model))
    wide = Net(width=48)
    before = wide.state_dict()
    fails(r"tensor \S+ is .*, expected .*\[", sq_cpu.load, folder, model=wide)
    for name, tensor in before.items():
        assert wide.state_dict()[name] is tensor or torch.equal(wide.state_dict()[name], tensor)
    assert type(wide.head) is nn.Linear
    short = net()
    del short.blocks[1]
    fails(r"layer blocks\.1\.1 is not a linear of Net", sq_cpu.load, folder, model=short)
    derived = sq_cpu.save(quantized("mine", "O1"), tmp_path / "mine")
    fails(r"holds a Mine, which transformers cannot build", sq_cpu.load, derived)
    assert_same(Mine.from_pretrained(derived), sq_cpu.load(derived, model=mine()))


def test_state_that_only_pickle_could_hold(tmp_path: Path) -> None:
    model: Any = sq_cpu.quantize(net(), smooth=False)
    model.shift = {"a": 1}
    fails(
        "_extra_state is a dict, which only pickle could store", sq_cpu.save, model, tmp_path / "o"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_a_compiled_model(tmp_path: Path) -> None:
    model = torch.compile(sq_cpu.quantize(net(), smooth=False))
    fails("is compiled; save the model itself, its _orig_mod", sq_cpu.save, model, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.uint16])
def test_dtypes_that_load_does_not_take(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    model.register_buffer("table", torch.zeros(3, dtype=dtype))
    sq_cpu.quantize(model, smooth=False)
    fails(f"table is {dtype}", sq_cpu.save, model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
