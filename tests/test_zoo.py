"""The models that accuracy is measured on: re-hosted and with outliers planted, functions kept."""

import copy
from typing import Any

import pytest
import torch
from rehost import HOSTS, norm_consumers, plant_outliers, rehost
from tiny import logits, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sq_cpu.errors import SqCpuError

LLAMA: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "head_dim": 8}


def relative(after: Tensor, before: Tensor) -> float:
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("model_type", HOSTS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_rehosted_model_computes_the_same(model_type: str, tied: bool) -> None:
    rope = {"rope_type": "default", "rope_theta": 300.0}
    llama = tiny_model("llama", rope_parameters=rope, tie_word_embeddings=tied, **LLAMA)
    hosted = rehost(llama, model_type)
    assert hosted.config.model_type == model_type
    # fp32 sums in another order: 2^-24 each, two blocks.
    assert relative(logits(hosted), logits(llama)) < 5e-6


@pytest.mark.parametrize("model_type", HOSTS)
def test_a_rehosted_model_has_weights_of_its_own(model_type: str) -> None:
    llama = tiny_model("llama", **LLAMA)
    before = logits(llama)
    with torch.no_grad():
        for parameter in rehost(llama, model_type).parameters():
            parameter.zero_()
    assert torch.equal(logits(llama), before)


def test_a_model_with_biases_is_not_rehosted() -> None:
    with pytest.raises(SqCpuError, match="without biases"):
        rehost(tiny_model("llama"), "mistral")


def model_to_plant(model_type: str) -> nn.Module:
    if model_type in ("llama", "opt"):
        return tiny_model(model_type)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("model_type", ["llama", "opt", "bloom", "gpt2"])
def test_planted_outliers_are_there_and_do_not_move_logits(model_type: str) -> None:
    model = model_to_plant(model_type)
    planted = copy.deepcopy(model)
    consumers = norm_consumers(planted)
    channels = plant_outliers(planted, consumers)
    assert len(consumers) == 4
    assert len(set(channels)) == 4
    # A scaled epsilon or bias would show; products and sums round alike at every exponent.
    assert relative(logits(planted), logits(model)) < 1e-6

    inputs: dict[str, list[Tensor]] = {name: [] for name in consumers}
    for each in (model, planted):
        for norm in consumers:
            each.get_submodule(norm).register_forward_hook(
                lambda _, __, output, norm=norm: inputs[norm].append(output)
            )
        logits(each)
    for before, after in inputs.values():
        ratio = after / before
        others = [i for i in range(ratio.shape[-1]) if i not in channels]
        assert torch.allclose(ratio[..., channels], torch.tensor(64.0), rtol=1e-4)
        assert torch.allclose(ratio[..., others], torch.tensor(1.0), rtol=1e-2)
