"""The benchmark of the int8 cache, on a tiny model."""

import run_int8_cache
import torch
from tiny import batches, tiny_model

from sq_cpu.inference.cache import Int8Layer


def test_it_compares_int8_with_floats() -> None:
    model = tiny_model("llama")
    found = run_int8_cache.accuracy(model, [ids[:1] for ids in batches()])
    assert 0 < found["kl_median"] < found["kl_p99"] < 0.01
    assert found["reference_perplexity"] != found["perplexity"]
    assert abs(found["percent"]) < 1
    assert found["same_top_1"] > 0.9


def test_it_times_both() -> None:
    model = tiny_model("llama", max_position_embeddings=128)
    made = []
    forward = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, __, kwargs: made.append(type(kwargs["past_key_values"].layers[0])),
        with_kwargs=True,
    )
    found = run_int8_cache.speed(model, torch.arange(3, 63), 2, 20, 3, 0.1)
    forward.remove()
    assert Int8Layer in made
    assert len(set(made)) == 2
    for name in ("int8 prompt", "float prompt"):
        assert found[name] > 0
