"""quantize(head="int8"): the head with two terms of activations, one copy with its embeddings."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_cases import Twice, calibrated, refuse
from tiny import batches, tiny_model
from torch import Tensor, nn

from sq_cpu.calibration.calibrate import Calibration, calibrate
from sq_cpu.nn.embedding import QuantEmbedding
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.quantization.head import HEAD_ALPHA, find_head
from sq_cpu.quantization.quantize import quantize
from sq_cpu.scheme import Scheme

TIED = {
    "llama": "model.embed_tokens",
    "gemma3_text": "model.embed_tokens",  # scaled, by a buffer
    "opt": "model.decoder.embed_tokens",
    "gpt2": "transformer.wte",
    "bloom": "transformer.word_embeddings",
    "mpt": "transformer.wte",
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(batches()[0]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("model_type", TIED)
def test_a_tied_embedding_reads_the_weight_of_the_head(model_type: str) -> None:
    model, calibration = calibrated(model_type, tie_word_embeddings=True)
    expected = logits(model)
    weight = model.lm_head.weight
    quantize(model, calibration, head="int8")
    record = model.sq_cpu_config
    assert record.embeddings == {TIED[model_type]: "lm_head"}
    assert record.layers[-1] == "lm_head"
    assert "lm_head" in record.smoothed
    assert "lm_head" not in record.kept
    head, embedding = model.lm_head, model.get_input_embeddings()
    assert isinstance(head, QuantLinear)
    assert head.scheme == Scheme.of("O1").with_activations("per_token_x2")
    assert isinstance(embedding, QuantEmbedding)
    assert embedding.head is head
    assert not any(parameter is weight for parameter in model.parameters())
    assert record.plan.groups[-1].name == "lm_head.input"
    assert record.plan.groups[-1].alpha == HEAD_ALPHA
    # Weights of 8 bits, and codes of the body that differ where the embeddings do.
    assert (logits(model) - expected).norm() < 0.06 * expected.norm()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox", "phi", "gptj"])
def test_an_embedding_of_its_own_stays_in_float(model_type: str) -> None:
    model, calibration = calibrated(model_type, tie_word_embeddings=False)
    alone = quantize(copy.deepcopy(model), calibration)
    expected = logits(alone)
    embedding = model.get_input_embeddings()
    quantize(model, calibration, head="int8")
    assert model.get_input_embeddings() is embedding
    assert model.sq_cpu_config.embeddings == {}
    head = model.get_output_embeddings()
    assert isinstance(head, QuantLinear)
    assert head.has_bias == (model_type in ("phi", "gptj"))
    # The body is the same: only the head's 8-bit weights differ.
    error = (logits(model) - expected).norm() / expected.norm()
    assert 0 < error < 0.01


def test_t5_shares_one_weight_among_three_embeddings() -> None:
    model = tiny_model("t5")
    ids = batches()[0]
    given = [{"input_ids": ids, "decoder_input_ids": ids}]
    quantize(model, calibrate(model, given), head="int8")
    assert set(model.sq_cpu_config.embeddings.values()) == {"lm_head"}
    for path in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
        embedding: Any = model.get_submodule(path)
        assert isinstance(embedding, QuantEmbedding)
        assert embedding.head is model.lm_head
    with torch.no_grad():
        assert model(**given[0]).logits.isfinite().all()


@pytest.mark.parametrize("scheme", ["O1", "O2", "O3"])
@pytest.mark.parametrize("smooth", [True, False])
def test_every_scheme_has_the_same_head(scheme: str, smooth: bool) -> None:
    model, calibration = calibrated("llama")
    quantize(model, calibration, scheme=scheme, smooth=smooth, head="int8")
    head: Any = model.lm_head
    assert head.scheme.activations == "per_token_x2"
    assert (head.smoothing is not None) == smooth
    assert model.sq_cpu_config.scheme.ignore == ("lm_head",)
    assert model.sq_cpu_config.layer_scheme("lm_head") == head.scheme


def test_without_a_calibration_the_head_is_not_smoothed() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    quantize(model, scheme="O1", smooth=False, head="int8")
    assert model.lm_head.smoothing is None
    assert isinstance(model.model.embed_tokens, QuantEmbedding)


def kept(model: Any, calibration: Calibration, **settings: Any) -> str:
    quantize(model, calibration, head="int8", **settings)
    record = model.sq_cpu_config
    assert "lm_head" not in record.layers
    assert record.embeddings == {}
    assert type(model.lm_head) is nn.Linear
    return record.kept["lm_head"]  # type: ignore[no-any-return]


class Shifted(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1


def test_a_head_that_cannot_be_int8_stays_in_float_and_says_why() -> None:
    model, calibration = calibrated("llama", tie_word_embeddings=True)
    model.model.embed_tokens.__class__ = Shifted
    assert kept(model, calibration) == (
        "its weight is also that of model.embed_tokens, a Shifted that does more than look up"
    )

    model, calibration = calibrated("llama", tie_word_embeddings=True)
    model.model.embed_tokens.register_forward_hook(lambda *_: None)
    assert "model.embed_tokens, which has forward hooks" in kept(model, calibration)

    model, calibration = calibrated("llama")
    assert calibration.head is not None
    assert kept(model, replace(calibration, head=None)) == (
        "the calibration does not cover it: calibrate again"
    )

    model, calibration = calibrated("bert")
    name = "cls.predictions.decoder"
    quantize(model, calibration, scheme=Scheme(ignore=("lm_head", "decoder")), head="int8")
    assert model.sq_cpu_config.kept[name] == "ignored"


def test_a_head_of_which_the_models_own_code_reads_the_weight_stays_in_float() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    forward = type(model).forward

    class Reading(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.lm_head.weight.sum()
            return forward(self, *args, **kwargs)

    model.__class__ = Reading
    calibration = calibrate(model, batches())
    assert kept(model, calibration) == "the model's own code uses its weight (sum)"


def test_a_model_without_a_head_has_none() -> None:
    model: Any = Twice()
    assert find_head(model, ()) is None
    quantize(model, calibrate(model, [torch.randn(4, 8)]), head="int8")
    assert model.sq_cpu_config.embeddings == {}
    assert len(model.sq_cpu_config.layers) == 2


def test_the_head_of_an_encoder_with_a_bias() -> None:
    model, calibration = calibrated("bert")
    expected = logits(model)
    quantize(model, calibration, head="int8")
    name = "cls.predictions.decoder"
    assert model.sq_cpu_config.embeddings == {"bert.embeddings.word_embeddings": name}
    assert model.get_submodule(name).has_bias
    assert (logits(model) - expected).norm() < 0.06 * expected.norm()


def test_a_plan_of_the_head_is_carried_out() -> None:
    model, calibration = calibrated("llama")
    first = quantize(copy.deepcopy(model), calibration, head="int8")
    plan: Any = first.sq_cpu_config.plan
    own = replace(plan.layers[0], activations="per_token")
    quantize(model, calibration, replace(plan, layers=(own,)), head="int8")
    assert model.lm_head.scheme.activations == "per_token"


def test_another_word_for_the_head_is_refused() -> None:
    model, calibration = calibrated("llama")
    refuse(model, "head is 'int4'; it is int8 or float", calibration, head="int4")


def test_a_calibration_keeps_the_head_apart(tmp_path: Path) -> None:
    model, calibration = calibrated("llama")
    head = calibration.head
    assert head is not None
    assert set(head.channel_min) == {"lm_head"}
    assert "lm_head" not in calibration.channel_min
    whole = calibration.with_head()
    assert whole.head is None
    assert set(whole.channel_min) == {*calibration.channel_min, "lm_head"}
    loaded = Calibration.load(calibration.save(tmp_path / "calibration"))
    assert loaded.head is not None
    assert torch.equal(loaded.head.absmax("lm_head"), head.absmax("lm_head"))
    assert loaded.channel_min.keys() == calibration.channel_min.keys()
    assert calibrate(model, batches(), ignore=()).head is None
