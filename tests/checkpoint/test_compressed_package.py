"""The format compressed-tensors against the package of that name, and transformers that uses it.

Without the package (Python 3.10, which it has left) these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_models import INT4, INT8, STATIC, TOKEN, compress
from test_compressed_save import SCHEMES, compressed, quantized
from tiny import batches, logits, tiny_model
from tiny_checkpoints import fails
from torch import Tensor, nn

import sq_cpu
from sq_cpu.checkpoint.load import load_floats
from sq_cpu.numerics.rounding import quantize_rows

pytest.importorskip("compressed_tensors", reason="compressed-tensors needs Python 3.11")

ASYMMETRIC = {"symmetric": False}
PER_TENSOR = INT8 | {"strategy": "tensor"}
GROUPS = INT4 | {"group_size": 16}
ROWS = INT4 | {"strategy": "channel", "group_size": None}
# Name -> weights, inputs, and whether the package and ours round inputs alike.
CASES: dict[str, tuple[Any, Any, bool]] = {
    "static": (INT8, STATIC, True),
    "static asymmetric": (INT8, STATIC | ASYMMETRIC, True),
    "static, one weight scale": (PER_TENSOR, STATIC, True),
    "token": (INT8, TOKEN, False),
    "token asymmetric": (INT8, TOKEN | ASYMMETRIC, True),
    "tensor found at run time": (INT8, TOKEN | {"strategy": "tensor"} | ASYMMETRIC, True),
    "W4A8 rows": (ROWS, TOKEN | ASYMMETRIC, True),
    "W4A8 asymmetric rows": (ROWS | ASYMMETRIC, TOKEN | ASYMMETRIC, True),
    "W4A8 groups": (GROUPS, TOKEN, False),
    "W4A16 groups": (GROUPS, None, False),
    "W4A16 asymmetric groups": (GROUPS | ASYMMETRIC, None, False),
    "W4A16 rows": (ROWS, None, False),
    "W8A16 rows": (INT8, None, False),
}


def median_difference(one: Tensor, other: Tensor) -> float:
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).median())


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", CASES)
def test_what_the_package_compressed(tmp_path: Path, name: str) -> None:
    weights, inputs, alike = CASES[name]
    ids = batches(1)[0]
    theirs = compress(tiny_model("llama"), ids, weights, inputs, tmp_path)
    # The floats are those that the package makes, to the bit.
    floats: Any = load_floats(tmp_path)
    for key, value in floats.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key
    if inputs is None:
        assert torch.equal(logits(floats), logits(theirs))
    if weights["strategy"] == "group":
        fails("a scale for every 16 input channels", sq_cpu.load, tmp_path, scheme=None)
        return
    ours: Any = sq_cpu.load(tmp_path, scheme=None if inputs else "O1")
    for path in ours.sq_cpu_config.layers:
        layer, linear = ours.get_submodule(path), theirs.get_submodule(path)
        assert torch.equal(layer.weight_float(), linear.weight), path
        if layer.static is not None:
            point = 0 if inputs["symmetric"] else int(linear.input_zero_point)
            assert layer.static == (linear.input_scale.item(), point + 128)
    if alike:
        # Sums in another order: 2^-24 a rounding, over two blocks of up to 48 products. A value so
        # near the middle of two codes that this tells gives a token, and those behind, another.
        assert difference(logits(ours), logits(theirs)) < 0.01
        assert median_difference(logits(ours), logits(theirs)) < 1e-6
    elif weights["num_bits"] == 8:
        # Of per-token inputs, codes of 127 and of 127.5 steps. Each rounds by up to half a step.
        assert difference(logits(ours), logits(theirs)) < 0.03


def test_some_rows_hold_minus_128(tmp_path: Path) -> None:
    compress(tiny_model("llama"), batches(1)[0], INT8, TOKEN, tmp_path)
    model: Any = sq_cpu.load(tmp_path)
    layers = [model.get_submodule(name) for name in model.sq_cpu_config.layers]
    rows = torch.cat([(layer.weight_int8() == -128).any(dim=1) for layer in layers])
    assert 0.2 < rows.float().mean() < 0.8
    x = torch.randn(5, layers[0].in_features)
    assert torch.equal(layers[0](x), layers[0].reference(x))


def test_symmetric_tokens_differ_in_the_step_alone(tmp_path: Path) -> None:
    theirs = compress(tiny_model("llama"), batches(1)[0], INT8, TOKEN, tmp_path)
    ours: Any = sq_cpu.load(tmp_path)
    scheme = ours.sq_cpu_config.scheme

    def rounded(module: nn.Linear, args: tuple[Tensor]) -> Tensor:
        rows = args[0].flatten(0, -2)
        codes, scale, point = quantize_rows(rows, scheme, None)
        return ((codes.float() - point[:, None]) * scale[:, None]).view_as(args[0])

    for name in ours.sq_cpu_config.layers:
        linear = theirs.get_submodule(name)
        linear.quantization_enabled = False  # of inputs; its weight is floats by now
        linear.register_forward_pre_hook(rounded)
    assert median_difference(logits(ours), logits(theirs)) < 1e-6  # as above


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_reads_what_is_saved(tmp_path: Path, name: str) -> None:
    model = quantized(scheme=SCHEMES[name])
    folder = compressed(model, tmp_path / "out")
    read, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values())
    found = logits(read.eval())
    for path in model.sq_cpu_config.layers:
        assert torch.equal(
            read.get_submodule(path).weight, model.get_submodule(path).weight_float()
        )
    # Of symmetric tokens, 127 steps here and 127.5 there; else as above.
    alike = "O3" in name or "asymmetric" in name
    assert difference(found, logits(model)) < (0.01 if alike else 0.03)
    assert not alike or median_difference(found, logits(model)) < 1e-6
