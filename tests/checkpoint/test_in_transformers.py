"""What people do with a model of transformers, done with a loaded int8 one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from byte_models import byte_model, byte_tokenizer
from sameness import assert_to_rounding
from tiny import batches, logits
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import sq_cpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = byte_model()
    calibration = sq_cpu.calibrate(model, batches(), progress=False)
    sq_cpu.quantize(model, calibration, scheme="O3", progress=False)
    return sq_cpu.save(model, tmp_path_factory.mktemp("in") / "out", byte_tokenizer())


@pytest.fixture
def model(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None  # as many tokens as are asked for
    return model


IDS = batches(1)[0][:1]


def made(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": 6, "attention_mask": torch.ones_like(ids)} | (
        options
    )
    result: Tensor = model.generate(ids, **options)
    return result


# --- generate -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 1, "num_return_sequences": 1},
    ],
    ids=str,
)
def test_ways_to_generate_the_same(options: Any, model: Any) -> None:
    assert torch.equal(made(model, **options), made(model))


def test_assisted(model: Any, folder: Path) -> None:
    assistant = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(made(model, assistant_model=assistant), made(model))


def test_beams_and_sampling(model: Any) -> None:
    assert made(model, num_beams=3).shape == (1, IDS.shape[1] + 6)
    torch.manual_seed(0)
    first = made(model, do_sample=True, temperature=2.0)
    torch.manual_seed(0)
    assert torch.equal(made(model, do_sample=True, temperature=2.0), first)


def test_streamer(model: Any) -> None:
    tokenizer = byte_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=made, args=(model,), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(made(model)[0, IDS.shape[1] :])


def test_left_padding(model: Any) -> None:
    rows = [IDS[0], IDS[0, 5:]]
    mask = torch.tensor([[1] * 16, [0] * 5 + [1] * 11])
    padded = torch.stack([rows[0], torch.cat([torch.zeros(5, dtype=torch.long), rows[1]])])
    found = made(model, padded, attention_mask=mask)
    for row, alone in zip(found, rows, strict=True):
        assert torch.equal(row[16:], made(model, alone[None])[0, len(alone) :])


def test_pipeline(model: Any) -> None:
    text = pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    (result,) = text("hello", generation_config=settings)
    assert result["generated_text"].startswith("hello")


# --- what wraps it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model, folder: Accelerator(cpu=True).prepare(model),
        lambda model, folder: dispatch_model(model, {"": "cpu"}, force_hooks=True),
        lambda model, folder: cpu_offload(model, "cpu"),
        lambda model, folder: disk_offload(model, folder, "cpu"),
    ],
    ids=["prepare", "dispatch", "cpu_offload", "disk_offload"],
)
def test_accelerate(wrap: Any, model: Any, tmp_path: Path) -> None:
    expected = logits(model)
    assert_to_rounding(logits(wrap(model, tmp_path)), expected, model.dtype)


def test_autocast(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model).isfinite().all()


def test_trainer_evaluates_what_was_quantized_in_place(tmp_path: Path) -> None:
    model = sq_cpu.quantize(byte_model(), smooth=False, progress=False)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    texts = [{"input_ids": ids, "labels": ids} for ids in batches(1)[0]]
    trainer = Trainer(model=model, args=arguments, eval_dataset=texts)
    assert trainer.evaluate()["eval_loss"] > 0


def test_trainer_does_not_fine_tune_a_loaded_model(model: Any, tmp_path: Path) -> None:
    # As with all quantized models: adapters are trained.
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=arguments)


def test_casts(model: Any) -> None:
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized"):
            cast()
    model.to(torch.bfloat16)
    assert logits(model).isfinite().all()
