"""A model whose decoder runs as one native call, with its calls and its `generate` as they are."""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.cache import Int8Cache, Int8Layer, prepare_layers, replace_layers
from sq_cpu.inference.kv_kinds import KvChoice, check_kv, choose_kv, kv_kinds
from sq_cpu.inference.lowering import compile_program
from sq_cpu.inference.masks import token_runs
from sq_cpu.inference.pages import split_rows
from sq_cpu.inference.prefix import Places, Prefix, PrefixedDecoder
from sq_cpu.inference.program import DecoderProgram, StepRows
from sq_cpu.kernels.paged_attention import BatchRows, KvKind, KvPages, page_bytes
from sq_cpu.models.bases import decoder_of
from sq_cpu.models.checks import check_is_module
from sq_cpu.models.hf_private import is_transformers
from sq_cpu.models.linears import head_of

__all__ = ["FusedDecoder", "fuse", "fused_of"]

# What a call may say besides, without a word on what the decoder computes.
_INDIFFERENT = {"cache_position", "logits_to_keep", "num_items_in_batch", "return_dict"}


def fuse(model: nn.Module, enabled: bool = True, kv: KvChoice | None = None) -> None:
    """Have a quantized decoder of transformers run as one native call, with int8 attention.

    Its calls and its `generate` stay as they are. A call that the program does not serve runs as
    before: in training, with gradients, while a module has hooks, given embeddings, a mask with
    gaps or sequences packed into one, one that asks for hidden states or weights, and one over a
    float cache that is not empty. A model that has changed is compiled again. From two threads, one
    call waits for the other.

    Parameters
    ----------
    model : with a head or without; linears of all blocks in int8
    enabled : False undoes it
    kv : what keys and values are kept in, as in `use_int8_attention`

    Raises
    ------
    SqCpuError
        That says why the model has no program; the model is as it was.
    """
    check_is_module(model)
    if is_transformers(model):  # others have no program
        check_kv(decoder_of(model), enabled, kv)
    fused = fused_of(model)
    if not enabled:
        if fused is not None:
            fused.undo()
        return
    if fused is None:
        fused = FusedDecoder(model)
    if kv is not None:
        choose_kv(fused.base.config, kv)


def fused_of(model: Any) -> FusedDecoder | None:
    """Return what `fuse` made of a model; None for one as it came."""
    forward = decoder_of(model).__dict__.get("forward")
    return forward if isinstance(forward, FusedDecoder) else None


class FusedDecoder:
    """The forward of a base model: ids to the last hidden state, by its program where it can.

    Attributes
    ----------
    same_function : True, which tells `save` that the model is what it was
    program : its stages
    base : the model without its head
    has_head : whether it gives logits
    """

    same_function = True

    def __init__(self, model: Any) -> None:
        """Compile, and take the place of the base model's forward."""
        self.base: Any = decoder_of(model)
        self._model = model
        self._given = _Given()
        self._before = self.base.__dict__.get("forward")
        self._plain = self.base.forward
        self._prefixed = self._before if isinstance(self._before, PrefixedDecoder) else None
        self._compile()
        self.base.forward = self
        try:
            self._finish_head()
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Give the base model the forward that it had."""
        del self.base.forward
        if self._before is not None:
            self.base.forward = self._before

    def _compile(self) -> None:
        with nullcontext() if self._prefixed is None else self._prefixed.paused():
            self.program: DecoderProgram = compile_program(self._model)
        if self.prefix is not None:
            for layer, (kv_heads, head_dim) in enumerate(self.program.cache_shapes):
                self.prefix.check_layer(layer, kv_heads, head_dim, head_dim)
        self._watch = _Watch(self._model, self.base)

    def _finish_head(self) -> None:
        self.has_head = head_of(self._model) is not None
        head = self.program.head
        self._to_logits = None if head is None else self.program.followed_by(head)

    @property
    def prefix(self) -> Prefix | None:
        """Return what texts may begin with whose keys and values are the float model's."""
        return None if self._prefixed is None else self._prefixed.prefix

    @property
    def page_bytes(self) -> int:
        """Return the bytes of a page of keys and values in all layers."""
        return sum(
            kv_heads * page_bytes(head_dim, kind)
            for (kv_heads, head_dim), kind in zip(
                self.program.cache_shapes, self.kv_kinds, strict=True
            )
        )

    @property
    def kv_kinds(self) -> list[KvKind]:
        """Return what new caches keep keys and values in, by layer."""
        return kv_kinds(self.base.config, len(self.program.cache_shapes))

    def make_pages(self, count: int) -> list[KvPages]:
        """Return so many pages for each layer."""
        return [
            KvPages(count, *shape, kind)
            for shape, kind in zip(self.program.cache_shapes, self.kv_kinds, strict=True)
        ]

    def runs(self, program: DecoderProgram) -> bool:
        """Tell whether this is still the program of the model, and the model fused."""
        return self.program is program and self.base.__dict__.get("forward") is self

    def hooked(self) -> bool:
        """Tell whether a module that the programs stand for has hooks."""
        head = None if self._to_logits is None else head_of(self._model)
        outside = head is not None and (head._forward_hooks or head._forward_pre_hooks)
        return bool(outside) or self._watch.hooked()

    def changed(self) -> bool:
        """Tell whether the model is another than the one that was compiled."""
        return self._watch.changed()

    def refresh(self) -> None:
        """Compile again what has changed since; `SqCpuError` where it has no program any more."""
        if self._watch.changed():
            self._compile()
            self._finish_head()

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Any:
        raise SqCpuError("a fused model is not copied: fuse(model, enabled=False) first")

    def __reduce__(self) -> Any:
        raise SqCpuError("a fused model is not pickled: fuse(model, enabled=False) first")

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> Any:
        """Return what the base model does."""
        if self._given.output is not None:
            return self._given.output
        begins = None
        if input_ids is not None and inputs_embeds is None and self._serves(others):
            begins = self._begins(input_ids, attention_mask, position_ids, past_key_values)
        cache = None if begins is None else self._cache(past_key_values)
        if begins is None or cache is None or input_ids is None:
            return self._plain(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **others,
            )
        self.refresh()
        batch, new = input_ids.shape
        seen = cache.get_seq_length()
        places: Places = []
        if self._prefixed is not None and not seen:
            found = self._prefixed.places(input_ids, attention_mask, position_ids)
            places = [(row, begin) for row, begin in found if begin == begins[row]]
        if position_ids is None:
            position_ids = torch.arange(seen, seen + new)[None]
            if self.program.own_positions:
                position_ids = (position_ids - torch.tensor(begins)[:, None]).clamp(min=0)
        at = position_ids.expand(batch, new)
        states = self.normed(
            self.run(cache, input_ids.long(), at, begins, [row for row, _ in places])
        )
        if self.prefix is not None and places:
            states = self.prefix.put_hidden(states, places)
        wanted = self.base.config.use_cache if use_cache is None else use_cache
        return self.program.output(
            last_hidden_state=states,
            past_key_values=cache if wanted or past_key_values is not None else None,
        )

    def _serves(self, others: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments, now, is one for the program."""
        if others.get("return_dict") is False:
            return False
        asked = (value for name, value in others.items() if name not in _INDIFFERENT)
        config = self.base.config
        return (
            all(value is None or value is False for value in asked)
            and not (config.output_hidden_states or config.output_attentions)
            and not (torch.is_grad_enabled() or self.base.training or self._watch.hooked())
        )

    def _begins(
        self, ids: Tensor, mask: Any, positions: Tensor | None, past: Cache | None
    ) -> list[int] | None:
        """Return where each sequence begins; None where the program does not serve the call."""
        if ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
            return None
        batch, new = ids.shape
        seen = 0 if past is None else past.get_seq_length()
        if positions is not None and (
            positions.dim() != 2 or positions.shape[1] != new or len(positions) not in (1, batch)
        ):
            return None
        if mask is None:
            packed = positions is not None and bool((positions.diff(dim=1) != 1).any())
            pads = [0] * batch if past is None else _pads(past, batch)
            return None if packed or any(pads) else pads
        if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != batch:
            return None
        runs = token_runs(mask, seen + new)
        if runs is None or runs[1] is not None:
            return None
        begins = runs[0] or [0] * batch
        return None if past is not None and seen and begins != _pads(past, batch) else begins

    def _cache(self, past: Cache | None) -> Cache | None:
        """Return the cache to use; None for one that the program cannot."""
        config = self.base.config
        if past is None:
            past = DynamicCache(config=config)
        elif not isinstance(past, DynamicCache | Int8Cache):
            return None
        if isinstance(past, DynamicCache):
            replace_layers(past, config)
        fits = len(past.layers) == len(self.program.cache_shapes)
        ours = all(isinstance(layer, Int8Layer) for layer in past.layers)
        return past if fits and ours else None

    def run(
        self,
        cache: Any,
        ids: Tensor,
        positions: Tensor,
        begins: list[int],
        prefixed: Sequence[int] = (),
    ) -> Tensor:
        """Run new positions of each sequence, whose keys and values go into the cache.

        Parameters
        ----------
        cache : whose layers are all `Int8Layer`
        ids, positions : int64 [batch, new]
        begins : the position where each sequence begins; ids before it are padding
        prefixed : which sequences begin with the prefix

        Returns
        -------
        fp32 [batch, new, hidden_size], the residual after the last block; 0 at padding and at the
        prefix, of which the keys and values go into the cache
        """
        layers = cache.layers
        dtype = self._model.dtype
        rows = prepare_layers(layers, self.program.cache_shapes, begins, ids.shape[1], dtype)
        tables = [*dict.fromkeys(layer.table for layer in layers)]
        if self.prefix is not None and prefixed:
            split = [split_rows(x, prefixed, len(self.prefix.ids), ids.shape[1]) for x in rows]
            rows = [rest for _, rest in split]
            for i, layer in enumerate(layers):
                self.write_prefix(i, layer.pages, split[tables.index(layer.table)][0])
        caches = [(layer.pages, tables.index(layer.table)) for layer in layers]
        batch = [each.rows for each in rows]
        flat, at = ids.flatten().contiguous(), positions.flatten().contiguous()
        if rows[0].kept is not None:
            flat, at = flat[rows[0].kept], at[rows[0].kept]
        hidden = torch.empty(0, self.base.config.hidden_size)
        if len(flat):
            hidden = self.program.run(flat, at, batch, caches, torch.arange(len(flat)))
        for layer in layers:
            layer.grow(ids.shape[1])
        if rows[0].kept is not None:
            whole = hidden.new_zeros(ids.numel(), hidden.shape[1])
            whole[rows[0].kept] = hidden
            hidden = whole
        return hidden.view(*ids.shape, -1)

    def write_prefix(self, layer: int, pages: KvPages, rows: BatchRows) -> None:
        """Write the keys and values of the prefix to the pages of a layer, for each sequence."""
        assert self.prefix is not None
        k, v = self.prefix.keys[layer].transpose(0, 1), self.prefix.values[layer].transpose(0, 1)
        count = len(rows.tensors[1])
        if count > 1:
            k, v = k.repeat(count, 1, 1), v.repeat(count, 1, 1)
        pages.append(rows, k, v)

    def prefix_logits(self) -> Tensor:
        """Return the logits of the prefix's last token, fp32 [1, vocabulary]."""
        assert self.prefix is not None
        return self._logits_of(self.prefix.hidden[-1:].to(self._model.dtype))

    def logits(self, step: StepRows, caches: Sequence[tuple[KvPages, int]]) -> Tensor:
        """Return the logits of the kept rows, fp32 [kept, vocabulary]; as `DecoderProgram.run`."""
        if self._to_logits is not None:
            return self._to_logits.run_step(step, caches)
        return self._logits_of(self.normed(self.program.run_step(step, caches)))

    def _logits_of(self, states: Tensor) -> Tensor:
        # What the model does after its base, to these states in the place of the base's.
        self._given.output = self.program.output(last_hidden_state=states[None])
        try:
            output = self._model(input_ids=torch.zeros(1, len(states)).long(), use_cache=False)
        finally:
            self._given.output = None
        logits: Tensor = output.logits[0].float()
        return logits

    def normed(self, hidden: Tensor) -> Tensor:
        """Return the last hidden state of a residual, as the head takes it."""
        norm = self.program.final_norm
        return (hidden if norm is None else norm.reference(hidden)).to(self._model.dtype)


def _pads(past: Cache, batch: int) -> list[int]:
    """Return the padding that an int8 cache knows of."""
    layer = past.layers[0] if past.layers else None
    if isinstance(layer, Int8Layer) and layer.table.batch == batch:
        return layer.table.pads
    return [0] * batch


class _Given(threading.local):
    """What this thread's next call of the base returns, if anything."""

    output: Any = None


class _Watch:
    """Tells whether a model is still the one that was compiled, in some 0.1 ms for 400 modules."""

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        every = [*model.modules()]
        self._tables = [
            table for each in every for table in (each._modules, each._parameters, each._buffers)
        ]
        self._members = self._now()
        self._tensors = [
            each for each in self._members if isinstance(each, Tensor) and not each.is_inference()
        ]
        self._versions = self._state()
        # The base's own are called around its forward.
        inside = itertools.islice(base.modules(), 1, None)
        self._hooks: list[Any] = [
            hooks for each in inside for hooks in (each._forward_hooks, each._forward_pre_hooks)
        ]

    def _now(self) -> list[Any]:
        return [member for table in self._tables for member in table.values()]

    def _state(self) -> list[tuple[int, int]]:
        return [(each._version, each.data_ptr()) for each in self._tensors]

    def changed(self) -> bool:
        """Tell whether a module, parameter or buffer is another, or was written to."""
        now = self._now()
        same = len(now) == len(self._members) and all(map(operator.is_, now, self._members))
        return not same or self._state() != self._versions

    def hooked(self) -> bool:
        """Tell whether a module within the base has hooks."""
        return any(self._hooks)
