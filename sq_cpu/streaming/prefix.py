"""The prefix of a model that is streamed, made and proven one block at a time.

A text of the prefix alone goes through every block when its linears are folded and still in float,
as it does through the whole model in memory; a text that goes on after it proves each block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from sq_cpu.checkpoint.prefix import hidden_entry, kv_entries
from sq_cpu.errors import SqCpuError
from sq_cpu.inference.prefix import (
    COPIES,
    NO_PREFIX,
    changing,
    check_same,
    decoder_with_cache,
    prefix_tokens,
    proving_text,
)
from sq_cpu.models.block_chain import BlockChain

__all__ = ["StreamedPrefix"]


class StreamedPrefix:
    """A prefix on its way through a chain of blocks.

    Attributes
    ----------
    hidden : what the next block takes of the prefix alone and of the text that proves it, float
        [2 and 1, tokens, hidden_size]

    Raises
    ------
    SqCpuError
        For a model that can have none, as far as that is known before its blocks run.
    """

    def __init__(self, chain: BlockChain, ids: Sequence[int]) -> None:
        self._chain = chain
        model = chain.model
        self._base = decoder_with_cache(model)
        tokens = prefix_tokens(model, ids)
        self._tokens = tokens.expand(COPIES, -1)
        layers = self._layers()
        if len(layers) != len(chain.names) or not all(isinstance(x, DynamicLayer) for x in layers):
            raise SqCpuError(f"{NO_PREFIX}: not all blocks keep keys and values of their own")
        texts = (self._tokens, proving_text(model, tokens))
        self._caches = [DynamicCache(config=self._base.config) for _ in texts]
        pairs = zip(texts, self._caches, strict=True)
        given = [((), {"input_ids": ids, "past_key_values": cache}) for ids, cache in pairs]
        self._calls = chain.capture(given)
        self.hidden = [call.take() for call in self._calls]

    def check_first(self) -> None:
        """Raise `SqCpuError` unless the first block, which is loaded, can have a prefix."""
        self._through(0)

    def block(self, index: int) -> dict[str, Tensor]:
        """Run the next block; return its keys and values by the names that they are stored under.

        Raises `SqCpuError` where it keeps something else in a cache, or other tokens see more.
        """
        try:
            k, v, self.hidden = self._through(index)
        except SqCpuError as error:  # the finished blocks are of a model that has one
            raise SqCpuError(
                f"{error}; begin again without: --prefix off --overwrite (prefix=(), "
                "overwrite=True)"
            ) from error
        return kv_entries(index, k, v)

    def last_hidden(self) -> dict[str, Tensor]:
        """Return the last hidden state by its name, in a model whose last block gives `hidden`."""
        given = {"past_key_values": DynamicCache(config=self._base.config), "use_cache": False}
        output = self._base(input_ids=self._tokens, **given)
        return hidden_entry(output.last_hidden_state[0].clone())

    def _layers(self) -> list[Any]:
        return list(DynamicCache(config=self._base.config).layers)

    def _through(self, index: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return what a block keeps of the prefix, and `hidden` after it."""
        count = self._tokens.shape[1]
        made: list[tuple[Tensor, Tensor]] = []

        def keep(k: Tensor, v: Tensor, layer: int) -> Any:
            if k.dim() != 4 or len(k) != COPIES or k.shape[2] != count or layer != index:
                raise SqCpuError(f"{NO_PREFIX}: layer {layer} keeps keys of the shape {[*k.shape]}")
            made.append((k[0].detach().clone(), v[0].detach().clone()))
            return k, v

        alone = self._run(0, index, keep)
        if len(made) != 1:
            raise SqCpuError(
                f"{NO_PREFIX}: block {index} keeps {len(made)} pairs of keys and values in a cache"
            )
        (own,) = made

        def put(k: Tensor, v: Tensor, _: int) -> Any:
            with_own = zip(own, (k, v), strict=True)
            return tuple(torch.cat([a[None], b[:, :, count:]], dim=2) for a, b in with_own)

        def others(k: Tensor, v: Tensor, _: int) -> Any:
            return k, torch.cat([v[:, :, :count] + 1, v[:, :, count:]], dim=2)

        plain = self._run(1, index, lambda k, v, _: (k, v))
        same, without = (self._run(1, index, change) for change in (put, others))
        # The rows of the prefix, too: the next block's keys and values are made of them.
        same = torch.cat([alone[:1], same[:, count:]], dim=1)
        check_same(same, plain, torch.cat([plain[:, :count], without[:, count:]], dim=1))
        return *own, [alone, plain]

    def _run(self, text: int, index: int, change: Callable[[Tensor, Tensor, int], Any]) -> Tensor:
        cache = self._caches[text]
        cache.layers = self._layers()  # the blocks hold the cache itself
        with changing(cache, change):
            return self._chain.run(index, self._calls[text], self.hidden[text])
