"""The benchmark of the int8 cache, on a tiny model."""

import run_int8_cache
import torch
from tiny import batches, tiny_model

import sq_cpu
from sq_cpu import QuantLinear, Scheme
from sq_cpu.inference.cache import Int8Layer


def test_it_compares_int8_with_floats() -> None:
    model = tiny_model("llama")
    int8, bf16 = run_int8_cache.accuracy(model, [ids[:1] for ids in batches()])
    assert (int8["cache"], bf16["cache"]) == ("int8", "bf16")
    assert 0 < bf16["kl_median"] < int8["kl_median"] < int8["kl_p99"] < 0.01
    for row in (int8, bf16):
        assert row["reference_perplexity"] != row["perplexity"]
        assert abs(row["percent"]) < 1
        assert row["same_top_1"] > 0.9


def test_the_same_weights_in_float() -> None:
    model = tiny_model("llama")
    sq_cpu.quantize(model, sq_cpu.calibrate(model, batches()), head="float")
    layer = model.model.layers[0].self_attn.o_proj
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    run_int8_cache.dequantize(model)
    linear = model.model.layers[0].self_attn.o_proj
    assert type(linear) is torch.nn.Linear
    # Rounded are the inputs alone, to 1 / 127 of the largest of their row.
    assert 0 < (linear(x) - y).norm() < 0.01 * y.norm()


def test_a_rotated_weight_in_float() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(100, 8)
    layer = QuantLinear.from_float(linear, Scheme(), smoothing=torch.rand(100) + 0.5, hadamard=64)
    model = torch.nn.Sequential(layer)
    run_int8_cache.dequantize(model)
    assert torch.equal(model[0].weight, layer.weight_float())
    assert (model[0].weight - linear.weight).norm() < 0.01 * linear.weight.norm()


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
