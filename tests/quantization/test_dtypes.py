"""What a model computes in around its int8 linears: kept by quantize, casts, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from other_models import ids, other_model
from sameness import assert_same_model
from tiny import inputs, tiny_model

import sq_cpu
from sq_cpu.errors import SqCpuError
from sq_cpu.quantization.record import QuantizationRecord


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
@pytest.mark.parametrize("scheme", ["O1", "O3"])
def test_a_linear_in_fp32_within_a_half_model(name: str, scheme: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "float")
    load = transformers.T5ForConditionalGeneration.from_pretrained
    model: Any = load(tmp_path / "float", dtype=torch.float16).eval()
    data = inputs(name)
    sq_cpu.quantize(model, sq_cpu.calibrate(model, data), scheme=scheme)
    expected = {n: "float32" for n in model.sq_cpu_config.layers if n.endswith(".wo")}
    assert model.sq_cpu_config.dtypes == expected != {}

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**data[0]).logits  # type: ignore[no-any-return]

    loaded = sq_cpu.load(sq_cpu.save(model, tmp_path / "int8"))
    assert_same_model(loaded, model, logits)
    assert loaded.sq_cpu_config == model.sq_cpu_config
    cast = sq_cpu.load(tmp_path / "int8", dtype=torch.bfloat16)
    assert {cast.get_submodule(n).weight.dtype for n in cast.sq_cpu_config.layers} == {
        torch.bfloat16
    }
    # Cast as a whole, no linear is another's equal in fp32 any more.
    again = sq_cpu.load(sq_cpu.save(model.half(), tmp_path / "half"))
    assert again.sq_cpu_config.dtypes == {}
    assert_same_model(again, model, logits)


def test_an_unknown_dtype_is_refused() -> None:
    record: Any = sq_cpu.quantize(tiny_model("llama"), smooth=False).sq_cpu_config
    assert "dtypes" not in record.to_dict()
    values = record.to_dict() | {"dtypes": {record.layers[0]: "nn"}}
    with pytest.raises(SqCpuError, match="has the dtype 'nn', not one of float32, bfloat16"):
        QuantizationRecord.from_dict(values)


def test_a_model_that_would_change_its_weights_again_is_not_saved(tmp_path: Path) -> None:
    model = other_model("rwkv")
    with torch.no_grad():
        first = model(ids()[0]).logits
    found = sq_cpu.calibrate(model, ids())
    sq_cpu.quantize(model, found, scheme="O3")
    with torch.no_grad():
        assert (model(ids()[0]).logits - first).norm() < 0.05 * first.norm()
    with pytest.raises(SqCpuError, match="layers_are_rescaled is True, in a fresh one False"):
        sq_cpu.save(model, tmp_path / "int8")
    assert not (tmp_path / "int8").exists()
