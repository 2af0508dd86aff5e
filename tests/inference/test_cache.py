"""The int8 cache against lists of float tensors, through random sequences of all that it does."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from sq_cpu import Int8Cache, SqCpuError
from sq_cpu.inference.cache import Int8Layer, replace_layers, update_of
from sq_cpu.inference.pages import PageTable

LAYERS, KV_HEADS, K_DIM, V_DIM = 2, 2, 12, 20


def cache_of(window: int = 0) -> Cache:
    table = PageTable(window)
    return Cache(layers=[Int8Layer(table) for _ in range(LAYERS)])


def states(batch: int, new: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, KV_HEADS, new, K_DIM), torch.randn(batch, KV_HEADS, new, V_DIM)


def near(read: Tensor, given: Tensor) -> bool:
    """Tell whether each channel is within what rounding a token's codes can do to it."""
    # Half a step of 1/127 of the largest; the rotation of keys spreads a block of 4 over each.
    step = given.abs().amax(dim=-1, keepdim=True) / 127
    return bool(((read - given).abs() <= 2 * step + 1e-6).all())


class Plain:
    """What the cache should hold, as one tensor a layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, layer: int, k: Tensor, v: Tensor) -> None:
        if layer == len(self.layers):
            self.layers.append((k, v))
            return
        old = self.layers[layer]
        self.layers[layer] = torch.cat((old[0], k), dim=2), torch.cat((old[1], v), dim=2)

    def gather(self, indices: list[int]) -> None:
        self.layers = [(k[indices], v[indices]) for k, v in self.layers]

    def crop(self, length: int) -> None:
        self.layers = [(k[:, :, :length], v[:, :, :length]) for k, v in self.layers]


def used_pages(cache: Cache) -> int:
    return sum(table.used for table in {id(x.table): x.table for x in cache.layers}.values())


@pytest.mark.parametrize("seed", range(25))
def test_random_operations(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    cache, plain, batch, length = cache_of(), Plain(), rng.randint(1, 3), 0
    for _ in range(30):
        what = rng.choice(["update", "update", "update", "crop", "reorder", "select", "repeat"])
        if what == "update" or length == 0:
            new = rng.choice([1, 1, 2, 30, 63, 64, 65, 130])
            length += new
            read = rng.random() < 0.7
            for i in range(LAYERS):
                k, v = states(batch, new)
                plain.update(i, k, v)
                handles = cache.update(k, v, i)
                for handle, expected in zip(handles, plain.layers[i], strict=True):
                    assert handle.shape == expected.shape
                    assert not read or near(handle + 0, expected)
        elif what == "crop":
            length = rng.randint(1, length)
            less = length - cache.get_seq_length()
            # The last is as transformers before 5.18 had it.
            cache.crop(rng.choice([less, torch.tensor(less), length]))
            plain.crop(length)
        elif what == "reorder":
            indices = [rng.randrange(batch) for _ in range(batch)]
            cache.reorder_cache(torch.tensor(indices))
            plain.gather(indices)
        elif what == "select" and batch > 1:
            chosen = sorted(rng.sample(range(batch), rng.randint(1, batch)))
            cache.batch_select_indices(torch.tensor(chosen))
            plain.gather(chosen)
            batch = len(chosen)
        elif what == "repeat" and batch < 4:
            cache.batch_repeat_interleave(2)
            plain.gather([i for i in range(batch) for _ in "12"])
            batch *= 2
        assert cache.get_seq_length() == length
        assert cache.get_mask_sizes(3, 1) == (length + 3, 0)
        for layer, expected in zip(cache.layers, plain.layers, strict=True):
            assert near(layer.keys, expected[0])
            assert near(layer.values, expected[1])
    cache.reset()
    assert used_pages(cache) == 0
    assert cache.get_seq_length() == 0
    k, v = states(2, 5)  # and it is as new
    assert near(cache.update(k, v, 0)[0] + 0, k)


def test_beams_share_full_pages_and_own_the_last() -> None:
    cache = cache_of()
    for i in range(LAYERS):
        cache.update(*states(1, 2 * 64 + 10), i)
    cache.batch_repeat_interleave(4)
    assert used_pages(cache) == 3
    for i in range(LAYERS):
        cache.update(*states(4, 1), i)
        cache.layers[i].flush()
    assert used_pages(cache) == 2 + 4
    cache.reorder_cache(torch.tensor([0, 0, 0, 1]))
    assert used_pages(cache) == 2 + 2


@pytest.mark.parametrize("recording", [False, True])
def test_a_window_releases_what_no_token_sees(recording: bool) -> None:
    window, length = 20, 700
    cache, plain = cache_of(window), Plain()
    if recording:
        cache.activate_past_recording()
    for _ in range(length // 10):
        for i in range(LAYERS):
            k, v = states(1, 10)
            plain.update(i, k, v)
            cache.update(k, v, i)
            cache.layers[i].flush()
    assert used_pages(cache) == (11 if recording else 2)
    last = cache.layers[1].keys[:, :, -window:]
    assert near(last, plain.layers[1][0][:, :, -window:])
    assert bool((cache.layers[1].keys[:, :, :500] == 0).all()) is not recording
    cache.crop(-60)
    assert near(cache.layers[0].keys[:, :, -window:], plain.layers[0][0][:, :, -window - 60 : -60])
    if recording:
        cache.crop(-400)
        assert near(cache.layers[0].keys, plain.layers[0][0][:, :, : length - 460])
    else:
        with pytest.raises(SqCpuError, match="activate_past_recording"):
            cache.crop(-400)


def test_keys_and_values_are_tensors_to_everything_else() -> None:
    cache = cache_of()
    k, v = states(2, 7)
    k_read, v_read = cache.update(k.bfloat16(), v.bfloat16(), 0)
    assert update_of(k_read, v_read) is not None
    assert update_of(v_read, k_read + 0) is None
    assert k_read.dtype == torch.bfloat16
    assert k_read.shape == k.shape
    q = torch.randn(2, KV_HEADS, 1, K_DIM, dtype=torch.bfloat16)
    assert torch.equal(q @ k_read.transpose(2, 3), q @ (k_read + 0).transpose(2, 3))
    assert k_read[:, :, None].shape == (2, KV_HEADS, 1, 7, K_DIM)
    assert torch.equal(copy.deepcopy(v_read), v_read + 0)


def test_a_copy_is_of_its_own() -> None:
    cache = cache_of()
    for i in range(LAYERS):
        cache.update(*states(1, 70), i)
    kept = copy.deepcopy(cache)
    before = cache.layers[0].keys
    for i in range(LAYERS):
        cache.update(*states(1, 1), i)
        cache.layers[i].flush()
    assert torch.equal(kept.layers[0].keys, before)
    assert kept.get_seq_length() == 70


def test_what_is_gone_is_not_read() -> None:
    cache = cache_of()
    k, _ = cache.update(*states(1, 5), 0)
    cache.crop(-2)
    with pytest.raises(SqCpuError, match="gone"):
        k + 0


def test_refused() -> None:
    cache = cache_of()
    cache.update(*states(2, 5), 0)
    with pytest.raises(SqCpuError, match="3 sequences for a cache of 2"):
        cache.update(*states(3, 5), 0)
    with pytest.raises(SqCpuError, match="no gradient"):
        cache.update(torch.randn(2, 2, 1, 12, requires_grad=True), states(2, 1)[1], 0)
    config = tiny_model("llama").config
    config.layer_types = ["linear_attention"] * 2
    with pytest.raises(SqCpuError, match="LlamaConfig names no layers"):
        Int8Cache(config)


def test_only_empty_float_layers_are_replaced() -> None:
    config = tiny_model("gemma3_text").config
    cache = DynamicCache(config=config)
    assert replace_layers(cache, config)
    assert all(isinstance(layer, Int8Layer) for layer in cache.layers)
    assert cache.is_sliding == DynamicCache(config=config).is_sliding
    assert not cache.is_compileable
    assert cache.is_croppable
    assert cache.get_max_length() == -1
    lazy = DynamicCache()
    assert replace_layers(lazy, config)
    assert len(lazy.layers) == config.num_hidden_layers
    full = DynamicCache(config=config)
    full.update(*states(1, 3), 0)
    full.update(*states(1, 3), 1)
    assert not replace_layers(full, config)
    assert not replace_layers(StaticCache(config=config, max_cache_len=8), config)
