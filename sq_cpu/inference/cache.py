"""The int8 KV cache, as a `Cache` of transformers; bf16 in layers whose config says so.

Its layers hold keys and values in pages, with a scale for each token and head, and share one
`PageTable` where they see alike. `update` gives lazy tensors: int8 attention reads the pages that
they stand for, any other operation gets them dequantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.kv_kinds import kv_kind, layer_count
from sq_cpu.inference.lazy import LazyTensor
from sq_cpu.inference.pages import CallRows, PageTable
from sq_cpu.kernels.paged_attention import AttentionOptions, KvKind, KvPages
from sq_cpu.parsing import check_kind

__all__ = ["Int8Cache", "Int8Layer", "Update", "prepare_layers", "replace_layers", "update_of"]


class Update:
    """Keys and values that a layer has been given.

    They are written to its pages when they are first read: only attention knows which are padding.
    """

    def __init__(self, layer: Int8Layer, k: Tensor, v: Tensor, seen: int, version: int) -> None:
        self.layer = layer
        self.seen = seen
        self.new = k.shape[2]
        self._version = version
        self._states: tuple[Tensor, Tensor] | None = (k, v)
        self._rows: CallRows | None = None

    @property
    def total(self) -> int:
        """Return the positions of the sequences, the new ones among them."""
        return self.seen + self.new

    def fits(self, begins: list[int]) -> bool:
        """Tell whether sequences may begin at these positions, after what was written of them."""
        return all(
            new == before or (before >= self.seen and new >= self.seen)
            for new, before in zip(begins, self.layer.table.pads, strict=True)
        )

    def write(self, begins: list[int] | None = None) -> None:
        """Write the new tokens to the pages, once.

        Parameters
        ----------
        begins : the positions where the sequences begin, which `fits`; None: as before
        """
        if self._states is None:
            return
        if begins is not None:
            self.layer.table.set_pads(begins)
        self._rows = self.layer.table.plan(self.seen, self.new)
        k, v = (self._rows.take(self.layer.padded(x)) for x in self._states)
        self.layer.pages.append(self._rows.rows, k, v)
        self._states = None

    def attend(self, q: Tensor, options: AttentionOptions) -> Tensor:
        """Return the attention of q [batch, heads, new, k_dim]: [batch, new, heads, v_dim].

        The new tokens are written.
        """
        self._check_version()
        assert self._rows is not None
        q = self._rows.take(self.layer.padded(q))
        y = self._rows.put_back(self.layer.pages.attend(self._rows.rows, q, options))
        return y[..., : self.layer.v_dim]

    def read(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of all positions, dequantized, in the dtype that they had."""
        self._check_version()
        self.write()
        return self.layer.read()

    def _check_version(self) -> None:
        if self.layer.version != self._version:
            raise SqCpuError("these keys and values are of a state of the cache that is gone")


def update_of(k: Tensor, v: Tensor) -> Update | None:
    """Return the update whose keys and values these are; None for other tensors."""
    if isinstance(k, LazyTensor) and isinstance(v, LazyTensor) and k.source is v.source:
        return k.source if isinstance(k.source, Update) else None
    return None


class Int8Layer(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of one layer.

    Parameters
    ----------
    table : which pages they lie in, with other layers of the same window
    kind : what they are kept in
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, table: PageTable, kind: KvKind = "int8") -> None:
        table.members.append(self)
        self.table = table
        self.kind: KvKind = kind
        self.version = 0
        """Another one when what is in the cache changes."""
        self._forget()

    def _forget(self) -> None:
        self.pool: KvPages | None = None
        self.dtype, self.k_dim, self.v_dim = torch.float32, 0, 0
        self._pending: Update | None = None
        self._seen = 0
        self._gathered = 0
        self.version += 1

    @property
    def is_initialized(self) -> bool:
        """Whether there are pages."""
        return self.pool is not None

    @property
    def is_sliding(self) -> bool:
        """Whether a token sees only the last ones."""
        return self.table.window > 0

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return self.table.batch

    @property
    def pages(self) -> KvPages:
        """The pages; there are some after the first update."""
        assert self.pool is not None
        return self.pool

    @property
    def keys(self) -> Tensor | None:
        """fp32, bf16 or fp16 [batch, kv_heads, positions, channels], dequantized."""
        return None if self.pool is None else self.read()[0]

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return None if self.pool is None else self.read()[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the pages for keys and values like these."""
        batch, kv_heads, _, k_dim = key_states.shape
        self.k_dim, self.v_dim, self.dtype = k_dim, value_states.shape[3], key_states.dtype
        if self.table.batch == 0:
            self.table.begin(batch)
        head_dim = max(self.k_dim, self.v_dim)
        self.pool = KvPages(self.table.capacity, kv_heads, head_dim, self.kind)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new positions; return those of all.

        Parameters
        ----------
        key_states, value_states : fp32, bf16 or fp16 [batch, kv_heads, new, channels]

        Raises
        ------
        SqCpuError
            For another batch than before, and states with a gradient.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise SqCpuError("an int8 cache has no gradient: call the model under torch.no_grad()")
        self.flush()
        if self.pool is None:
            self.lazy_initialization(key_states, value_states)
        batch, heads, new = key_states.shape[:3]
        if batch != self.table.batch:
            raise SqCpuError(f"{batch} sequences for a cache of {self.table.batch}; reset() it")
        self.version += 1
        update = Update(self, key_states, value_states, self._seen, self.version)
        self._pending = update
        self._seen += new
        k, v = (
            LazyTensor(
                (batch, heads, self._seen, dim), self.dtype, update, lambda i=i: update.read()[i]
            )
            for i, dim in enumerate((self.k_dim, self.v_dim))
        )
        return k, v

    def grow(self, new: int) -> None:
        """Count new positions, which somebody else has written."""
        self._seen += new
        self.version += 1

    def flush(self) -> None:
        """Write what no attention has read."""
        if self._pending is not None:
            self._pending.write()
            self._pending = None

    def padded(self, x: Tensor) -> Tensor:
        """Return x with zeros for channels that only the wider of keys and values has."""
        missing = self.pages.head_dim - x.shape[-1]
        return functional.pad(x, (0, missing)) if missing else x

    def read(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of all positions, dequantized, in the dtype that they had."""
        self.flush()
        k, v = self.table.read(self.pages, self._seen)
        return k[..., : self.k_dim].to(self.dtype), v[..., : self.v_dim].to(self.dtype)

    def get_seq_length(self) -> int:
        """Return the positions so far, padding among them."""
        return self._seen

    def get_max_length(self) -> int:
        """Return -1: there is none."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a call with so many queries has, and the position of the first."""
        return self._seen + query_length, 0

    def activate_past_recording(self) -> None:
        """Keep what is outside of the window from now on, so that any `crop` is exact."""
        self.table.keep_all = True

    @property
    def record_past(self) -> bool:
        """Whether what is outside of the window is kept."""
        return self.table.keep_all

    @record_past.setter
    def record_past(self, keep: bool) -> None:
        self.table.keep_all = keep

    def reset(self) -> None:
        """Forget everything; no page is left in use."""
        self._forget()
        self.table.reset()

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last positions.

        Parameters
        ----------
        tokens_to_remove : minus so many; or, as transformers before 5.18 did, how many to keep. A
            tensor of one number where assisted generation has it so

        Raises
        ------
        SqCpuError
            Where a window no longer has what it would show.
        """
        count = int(tokens_to_remove)
        keep = count + (self._seen if count <= 0 else 0)
        if self.pool is None or keep >= self._seen:
            return
        self._seen = max(0, keep)
        self.version += 1
        self.table.crop(self._seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i what sequence beam_idx[i] was."""
        self._gather(lambda _: beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, one after another."""
        self._gather(lambda batch: [i for i in range(batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences."""
        self._gather(lambda batch: torch.arange(batch)[indices].tolist())

    def _gather(self, choose: Callable[[int], list[int]]) -> None:
        """Have the table do it: once, for the first of its layers that asks."""
        self._gathered += 1
        self.version += 1
        if self._gathered > self.table.gathered:
            self.table.gather(choose(self.table.batch))

    def offload(self) -> None:
        """Do nothing: the pages are in the memory of the CPU."""

    def prefetch(self) -> None:
        """Do nothing: the pages are in the memory of the CPU."""


def prepare_layers(
    layers: Sequence[Int8Layer],
    shapes: Sequence[tuple[int, int]],
    begins: list[int],
    new: int,
    dtype: torch.dtype,
) -> list[CallRows]:
    """Make room for new positions, which somebody writes to the pages and then counts (`grow`).

    Parameters
    ----------
    layers : all of a cache, with the same number of positions
    shapes : kv heads and head size of each
    begins : the position where each sequence begins; before it is padding
    new : positions of the call
    dtype : that keys and values are given in to others

    Returns
    -------
    the rows of each table, in the order in which the layers name them

    Raises
    ------
    SqCpuError
        For another batch than before, and layers of different lengths.
    """
    if len({layer.get_seq_length() for layer in layers}) != 1:
        raise SqCpuError("the layers of an int8 cache have different lengths")
    for layer, (kv_heads, head_dim) in zip(layers, shapes, strict=True):
        layer.flush()
        if layer.pool is None:
            layer.lazy_initialization(*[torch.empty(len(begins), kv_heads, 0, head_dim)] * 2)
            layer.dtype = dtype
        if layer.table.batch != len(begins):
            raise SqCpuError(
                f"{len(begins)} sequences for a cache of {layer.table.batch}; reset() it"
            )
    tables = dict.fromkeys(layer.table for layer in layers)
    for table in tables:
        table.set_pads(begins)
    rows = [table.plan(layers[0].get_seq_length(), new) for table in tables]
    return rows


def replace_layers(cache: Cache, config: Any) -> bool:
    """Give an empty cache int8 layers where it has, or will have, those of float keys and values.

    Layers of other kinds, as of linear attention, stay. Returns whether any was replaced.
    """
    if cache.offloading:
        return False
    if not cache.layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers = DynamicCache(config=config).layers
        cache.layer_class_to_replicate = None
    tables: dict[int, PageTable] = {}
    for i, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and not layer.is_initialized:
            window = getattr(layer, "sliding_window", 0)
            table = tables.setdefault(window, PageTable(window))
            table.keep_all |= getattr(layer, "record_past", False)
            cache.layers[i] = Int8Layer(table, kv_kind(config, i))
    return bool(tables)


class Int8Cache(Cache):  # type: ignore[misc]
    """A `Cache` of transformers whose keys and values are int8, for `past_key_values`.

    With `attn_implementation="sq_cpu"` attention reads it as it is; any other gets floats.

    Parameters
    ----------
    model_or_config : a model of transformers, or its config

    Raises
    ------
    SqCpuError
        For a model without layers that have keys and values.
    """

    def __init__(self, model_or_config: Any) -> None:
        config = getattr(model_or_config, "config", model_or_config)
        check_kind(
            PreTrainedConfig, "a model of transformers, nor a config", model_or_config=config
        )
        layer_count(config)  # which tells why there can be none
        super().__init__(layers=DynamicCache(config=config).layers)
        if not replace_layers(self, config):
            raise SqCpuError(
                f"{type(config).__name__} names no layers with keys and values: "
                "an int8 cache would hold nothing"
            )

    @property
    def pages_in_use(self) -> int:
        """How many pages hold tokens; a page of 64 tokens is in all layers of the same window."""
        ours = [layer for layer in self.layers if isinstance(layer, Int8Layer)]
        return sum(table.used for table in {id(x.table): x.table for x in ours}.values())
