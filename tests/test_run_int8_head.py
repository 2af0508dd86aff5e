"""The benchmark of the int8 head, on a tiny model."""

import copy

import pytest
import run_int8_head
from tiny import batches, tiny_model

import sq_cpu


@pytest.mark.parametrize("tied", [False, True])
def test_it_tells_the_head_from_the_embedding(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    calibration = sq_cpu.calibrate(model, batches())
    other = sq_cpu.quantize(copy.deepcopy(model), calibration, head="int8")
    sq_cpu.quantize(model, calibration, head="float")
    rows = run_int8_head.accuracy(model, other, [ids[:1] for ids in batches()])
    kinds = ["head", "embedding", "both"] if tied else ["head"]
    assert [row["int8"] for row in rows] == kinds
    for row in rows:
        assert 0 < row["kl_median"] < row["kl_p99"] < 0.01
        assert row["reference_perplexity"] == rows[0]["reference_perplexity"]
    assert other.sq_cpu_config.embeddings.keys() == ({"model.embed_tokens"} if tied else set())
    assert other.get_output_embeddings() is other.lm_head
    assert isinstance(other.lm_head, sq_cpu.QuantLinear)
