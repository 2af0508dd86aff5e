"""PEFT's LoRA on an int8 base: trained, unloaded, saved and loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batches, logits, mixed_plan, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sq_cpu
from sq_cpu import Scheme, SqCpuError, with_int8_layers
from sq_cpu.nn.decomposed import DecomposedLinear

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model  # noqa: E402

# What PEFT itself calls.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

# One without an int8 linear after it, and all.
LAST = {"target_modules": ["down_proj"], "layers_to_transform": [1]}
ALL = {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}


def quantized(**config: Any) -> Any:
    model = tiny_model("llama", **config)
    calibration = sq_cpu.calibrate(model, batches(), progress=False)
    return sq_cpu.quantize(model, calibration, scheme="O3", progress=False)


def train(model: Any, steps: int = 6) -> list[float]:
    ids, losses = batches(1)[0], []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def loaded(model: Any, path: Path) -> Any:
    config = with_int8_layers(PeftConfig.from_pretrained(path))
    return PeftModel.from_pretrained(model, path, config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [LAST, ALL], ids=["last", "all"])
def test_trained_saved_loaded_unloaded(targets: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized(dtype=dtype)
    base = logits(model)
    adapted = get_peft_model(model, with_int8_layers(LoraConfig(**targets, r=4)))
    assert torch.equal(logits(adapted), base)  # B is 0 at first
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    losses = train(adapted)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-3
    found = logits(adapted.eval())
    assert not torch.equal(found, base)
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 100_000
    assert adapted.unload() is model
    assert torch.equal(logits(model), base)
    again = loaded(AutoModelForCausalLM.from_pretrained(sq_cpu.save(model, tmp_path / "int8")),
                   tmp_path / "adapter")  # fmt: skip
    assert torch.equal(logits(again.eval()), found)
    with again.disable_adapter():
        assert torch.equal(logits(again), base)


def test_trainer(tmp_path: Path) -> None:
    # Of a loaded model, which says that it is quantized.
    model = AutoModelForCausalLM.from_pretrained(sq_cpu.save(quantized(), tmp_path / "int8"))
    adapted = get_peft_model(model, with_int8_layers(LoraConfig(**LAST, r=4)))
    ids = batches(1)[0][0]
    trainer = Trainer(
        model=adapted,
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"),
            report_to=[],
            use_cpu=True,
            max_steps=2,
            save_strategy="no",
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": ids, "labels": ids}] * 8,
    )
    assert trainer.train().global_step == 2
    trainer.save_model()
    assert torch.equal(logits(loaded(quantized(), tmp_path / "out").eval()), logits(adapted.eval()))


def test_add_adapter(tmp_path: Path) -> None:
    model = quantized()
    base = logits(model)
    model.add_adapter(with_int8_layers(LoraConfig(**ALL, r=2)))
    assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path / "adapter")  # the adapter alone, as of any model
    written = set(os.listdir(tmp_path / "adapter"))
    assert {"adapter_model.safetensors", "adapter_config.json"} <= written
    assert not {"model.safetensors", "config.json"} & written
    assert torch.equal(logits(loaded(quantized(), tmp_path / "adapter").eval()), base)


def test_linears_with_channels_in_float() -> None:
    model = tiny_model("llama")
    calibration = sq_cpu.calibrate(model, batches(), progress=False)
    plan = mixed_plan(model, calibration, Scheme())
    sq_cpu.quantize(model, calibration, plan, progress=False)
    layers = dict(model.named_modules())
    names = [name for name in layers if isinstance(layers[name], DecomposedLinear)]
    base = logits(model)
    adapted = get_peft_model(model, with_int8_layers(LoraConfig(target_modules=names)))
    assert torch.equal(logits(adapted), base)
    adapted.unload()
    assert all(isinstance(model.get_submodule(name), DecomposedLinear) for name in names)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(quantized(), LoraConfig(**LAST))
    for option, match in [
        ({"use_dora": True}, "use_dora=False"),
        ({"init_lora_weights": "pissa"}, "use True, False or 'gaussian'"),
    ]:
        with pytest.raises(SqCpuError, match=match):
            get_peft_model(quantized(), with_int8_layers(LoraConfig(**LAST, **option)))
    adapted = get_peft_model(quantized(), with_int8_layers(LoraConfig(**LAST)))
    with pytest.raises(SqCpuError, match="not merged into int8 weights"):
        adapted.merge_and_unload()
    with pytest.raises(SqCpuError, match="config is a dict"):
        with_int8_layers({})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SqCpuError, match=r"peft is not installed: pip install 'sq_cpu\[peft\]'"):
        with_int8_layers({})
