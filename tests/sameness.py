"""What of two models must be equal bit for bit, and what to rounding only.

Ours is exact: every stored tensor, and what an int8 linear makes of an input. torch's float
products are not: how a weight lies in memory, the thread count and the processor decide in which
order they add.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sq_cpu import QuantLinear


def digests(model: Any) -> dict[str, str]:
    """Return the SHA-256 of every tensor of a model's state, and of its int8 linears' outputs."""
    tensors: dict[str, Tensor] = dict(model.state_dict())
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, QuantLinear):
                tensors[f"{name}()"] = layer(exact_rows(layer.in_features))
    return {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors.items()
    }


def exact_rows(features: int) -> Tensor:
    """Return rows of both signs, fp32 [5, features], whose bits no processor rounds otherwise."""
    codes = torch.arange(5 * features).reshape(5, features) * 37 % 255 - 127
    return codes / 64


def assert_same_model(found: Any, expected: Any, *outputs: Callable[[Any], Tensor]) -> None:
    """Compare all that is ours, bit for bit, and a model's outputs to rounding."""
    assert digests(found) == digests(expected)
    for output in outputs:
        assert_to_rounding(output(found), output(expected), expected.dtype)


def assert_to_rounding(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare the outputs of a tiny model that torch computed in `dtype`, in whatever order.

    A float product errs by units in the last place, a few 2^-24 in fp32. But an activation at the
    border of two int8 codes then takes the other one, a step of 1/127 of the largest: in one of 32
    terms, it moves the logits by up to 0.4 % of the largest. In bf16 and fp16 such units themselves
    are the greater part, and those of a few layers add up.
    """
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    bound = max(1e-2, 8 * torch.finfo(dtype).eps) * expected.float().abs().max()
    assert (found.float() - expected.float()).abs().max() <= bound


_ELSEWHERE = """
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sq_cpu

tests, loader, *names = sys.argv[1:]
sys.path.append(tests)
from sameness import digests

load = {"load": sq_cpu.load, "from_pretrained": AutoModelForCausalLM.from_pretrained}[loader]
ids = load_file("ids.safetensors")["ids"]
models = {name: load(name) for name in names}
with torch.no_grad():
    save_file({name: model(ids).logits for name, model in models.items()}, "logits.safetensors")
print(json.dumps({name: digests(model) for name, model in models.items()}))
"""


def logits_of_a_fresh_process(
    models: dict[str, Any], ids: Tensor, folder: Path, *, loader: str = "load"
) -> dict[str, Tensor]:
    """Return the logits of checkpoints in `folder`, by name, as another process computes them.

    Compares all that is ours with these models, bit for bit.
    """
    save_file({"ids": ids}, folder / "ids.safetensors")
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-W", "error", "-c", _ELSEWHERE, tests, loader, *models]
    output = subprocess.run(command, check=True, cwd=folder, stdout=subprocess.PIPE).stdout
    assert json.loads(output) == {name: digests(model) for name, model in models.items()}
    return load_file(folder / "logits.safetensors")
