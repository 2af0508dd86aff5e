"""A packed linear in a module of vLLM."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="scripts/vllm test has it")


@pytest.mark.filterwarnings("ignore")  # vLLM's own
def test_a_compiled_graph_is_found_again_for_the_same_numbers_alone() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from sq_cpu.kernels.torch_ops import linear_settings
    from sq_cpu.vllm_plugin.packing import pack_into

    weight, scale = torch.ones(16, 64, dtype=torch.int8), torch.ones(16)

    def hashed(*scales: float) -> str:
        config = VllmConfig()
        with set_current_vllm_config(config):
            for each in scales:
                settings = linear_settings("static", static=(each, 128))
                pack_into(nn.Module(), weight, scale, settings)
        found: str = config.compute_hash()
        return found

    assert hashed(0.5, 0.25) == hashed(0.5, 0.25)
    assert len({hashed(0.5, 0.25), hashed(0.25, 0.5), hashed(0.5), hashed()}) == 4
