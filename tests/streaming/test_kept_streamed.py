"""What stays in float, streamed: as in memory, or refused where a block alone cannot tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from float_folders import assert_equal, batches, float_folder, in_memory
from other_models import ids, other_model

import sq_cpu
from sq_cpu import Scheme, SqCpuError


@pytest.mark.parametrize("scheme", ["O1", "O3"])
def test_weights_that_the_models_code_uses(tmp_path: Path, scheme: str) -> None:
    other_model("mamba").save_pretrained(tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    sq_cpu.quantize(model, sq_cpu.calibrate(model, ids()), scheme=scheme)
    sq_cpu.save(model, tmp_path / "whole")
    made = sq_cpu.quantize_checkpoint(
        tmp_path / "float", tmp_path / "streamed", ids(), scheme=scheme
    )
    assert "the model's own code uses its weight (matmul)" in made.record.kept.values()
    assert_equal(tmp_path / "streamed", tmp_path / "whole")


@pytest.mark.parametrize("unreached", ["float", "quantize"])
def test_what_no_batch_reached(tmp_path: Path, unreached: Any) -> None:
    few = [torch.tensor([[1, 2, 3]])]
    source = float_folder(tmp_path / "float", "mixtral", num_local_experts=8)
    scheme = Scheme(unreached=unreached)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    sq_cpu.quantize(model, sq_cpu.calibrate(model, few), scheme=scheme)
    sq_cpu.save(model, tmp_path / "whole")
    made = sq_cpu.quantize_checkpoint(source, tmp_path / "streamed", few, scheme=scheme)
    unreached_ones = "no calibration batch reached it" in made.record.kept.values()
    assert unreached_ones == (unreached == "float")
    assert_equal(tmp_path / "streamed", tmp_path / "whole")


def test_a_subtree_stays_in_float(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    scheme = Scheme.of("O3", ignore=("lm_head", "layers.1", "mlp"))
    in_memory(source, tmp_path / "whole", scheme)
    made = sq_cpu.quantize_checkpoint(source, tmp_path / "streamed", batches(), scheme=scheme)
    assert {name.split(".")[2] for name in made.record.layers} == {"0", "2"}
    assert not any("mlp" in name for name in made.record.layers)
    assert_equal(tmp_path / "streamed", tmp_path / "whole")


def test_a_use_from_outside_of_a_block_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = float_folder(tmp_path / "float")
    forward = transformers.LlamaForCausalLM.forward

    def looking(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.model.layers[1].mlp.up_proj.weight.norm()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", looking)
    with pytest.raises(SqCpuError, match=r"layers\.1\.mlp\.up_proj: .* uses its weight \(norm\)"):
        sq_cpu.quantize_checkpoint(source, tmp_path / "out", batches())
    assert not (tmp_path / "out").exists()
