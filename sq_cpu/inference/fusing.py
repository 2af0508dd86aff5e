"""A model whose decoder runs as one native call, with its calls and its `generate` as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.cache import Int8Cache, Int8Layer, prepare_layers, replace_layers
from sq_cpu.inference.lowering import compile_program
from sq_cpu.inference.masks import token_runs
from sq_cpu.inference.program import DecoderProgram
from sq_cpu.nn.linear import QuantLinear

__all__ = ["FusedDecoder", "fuse", "fused_of"]

# What a call may say besides, without a word on what the decoder computes.
_INDIFFERENT = {"cache_position", "return_dict", "logits_to_keep", "num_items_in_batch"}


def fuse(model: nn.Module, enabled: bool = True) -> None:
    """Have a quantized decoder of transformers run as one native call, with int8 attention.

    Its calls and its `generate` stay as they are. A call that the program does not serve runs as
    before: with gradients or hooks, given embeddings or a mask with gaps, one that asks for hidden
    states or weights, and one over a float cache that is not empty.

    Parameters
    ----------
    model : with a head or without; linears of all blocks in int8
    enabled : False undoes it

    Raises
    ------
    SqCpuError
        That says why the model has no program.
    """
    fused = fused_of(model)
    if not enabled:
        if fused is not None:
            del fused.base.forward
        return
    if fused is None:
        FusedDecoder(model)


def fused_of(model: Any) -> FusedDecoder | None:
    """Return what `fuse` made of a model; None for one as it came."""
    forward = getattr(model, "base_model", model).__dict__.get("forward")
    return forward if isinstance(forward, FusedDecoder) else None


class FusedDecoder:
    """The forward of a base model: ids to the last hidden state, by its program where it can.

    Attributes
    ----------
    same_function : True, which tells `save` that the model is what it was
    program : its stages
    base : the model without its head
    """

    same_function = True

    def __init__(self, model: Any) -> None:
        """Compile, and take the place of the base model's forward."""
        self.program: DecoderProgram = compile_program(model)
        self.base = model.base_model
        self._model = model
        self._head = model.get_output_embeddings()
        self._plain = self.base.forward
        self.base.forward = self
        self._head_alone = self._head is not None and self._has_plain_head()
        self._to_logits = None
        if self._head_alone and type(self._head) is QuantLinear:
            self._to_logits = self.program.followed_by(self._head)

    @torch.inference_mode()
    def _has_plain_head(self) -> bool:
        """Whether logits are what the head gives, not scaled or capped."""
        ids = torch.arange(4)[None]
        states = self.base(input_ids=ids, use_cache=False).last_hidden_state
        wanted: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return torch.equal(wanted, self._head(states))

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
        call = self._prepare(input_ids, attention_mask, past_key_values, use_cache, others)
        if inputs_embeds is not None or call is None or input_ids is None:
            return self._plain(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **others,
            )
        cache, begins, wanted = call
        batch, new = input_ids.shape
        seen = cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + new)[None]
        hidden = self.run(cache, input_ids, position_ids.expand(batch, new), begins)
        return BaseModelOutputWithPast(
            last_hidden_state=self.normed(hidden), past_key_values=cache if wanted else None
        )

    def _prepare(
        self,
        ids: Tensor | None,
        mask: Any,
        past: Cache | None,
        use_cache: bool | None,
        others: Mapping[str, Any],
    ) -> tuple[Cache, list[int], bool] | None:
        """Return the cache to use, where sequences begin, and whether the caller gets the cache.

        None where the program does not serve the call.
        """
        if ids is None or ids.dim() != 2 or not ids.shape[1] or torch.is_grad_enabled():
            return None
        if any(others[name] not in (None, False) for name in others.keys() - _INDIFFERENT):
            return None
        config = self.base.config
        wanted = config.use_cache if use_cache is None else use_cache
        if past is None:
            past = DynamicCache(config=config)
        elif not isinstance(past, DynamicCache | Int8Cache):
            return None
        if isinstance(past, DynamicCache):
            replace_layers(past, config)
        layers = past.layers
        if len(layers) != len(self.program.cache_shapes) or not all(
            isinstance(layer, Int8Layer) for layer in layers
        ):
            return None
        seen = past.get_seq_length()
        if mask is None:
            table = layers[0].table
            return past, table.pads if seen and table.batch == len(ids) else [0] * len(ids), wanted
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        runs = token_runs(mask, seen + ids.shape[1])
        if runs is None or runs[1] is not None:
            return None
        begins = runs[0] or [0] * len(ids)
        if seen and begins != layers[0].table.pads:
            return None
        return past, begins, wanted

    def run(
        self,
        cache: Any,
        ids: Tensor,
        positions: Tensor,
        begins: list[int],
        last: DecoderProgram | None = None,
    ) -> Tensor:
        """Run new positions of each sequence, whose keys and values go into the cache.

        Parameters
        ----------
        cache : whose layers are all `Int8Layer`
        ids, positions : int64 [batch, new]
        begins : the position where each sequence begins; ids before it are padding
        last : a program whose result is wanted for the last position of each sequence alone

        Returns
        -------
        fp32 [batch, new, hidden_size], 0 at padding: the residual after the last block; or [batch,
        width] of `last`
        """
        layers = cache.layers
        dtype = self._model.dtype
        rows = prepare_layers(layers, self.program.cache_shapes, begins, ids.shape[1], dtype)
        tables = [*dict.fromkeys(layer.table for layer in layers)]
        caches = [(layer.pages, tables.index(layer.table)) for layer in layers]
        batch = [each.rows for each in rows]
        flat, at = ids.flatten().contiguous(), positions.flatten().contiguous()
        if rows[0].kept is not None:
            flat, at = flat[rows[0].kept], at[rows[0].kept]
        if last is not None:
            return last.run(flat, at, batch, caches, batch[0].tensors[0][1:] - 1)
        hidden = self.program.run(flat, at, batch, caches, torch.arange(len(flat)))
        if rows[0].kept is not None:
            whole = hidden.new_zeros(ids.numel(), hidden.shape[1])
            whole[rows[0].kept] = hidden
            hidden = whole
        return hidden.view(*ids.shape, -1)

    def logits(self, cache: Any, ids: Tensor, positions: Tensor, begins: list[int]) -> Tensor:
        """Return the logits of each sequence's last position, [batch, vocabulary]; as `run`."""
        if self._to_logits is not None:
            return self.run(cache, ids, positions, begins, self._to_logits)
        if self._head_alone:
            hidden = self.normed(self.run(cache, ids, positions, begins, self.program))
            return self._head(hidden)  # type: ignore[no-any-return]
        seen = cache.get_seq_length()
        mask = torch.arange(seen + ids.shape[1])[None] >= torch.tensor(begins)[:, None]
        output = self._model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def normed(self, hidden: Tensor) -> Tensor:
        """Return the last hidden state of a residual, as the head takes it."""
        norm = self.program.final_norm
        return (hidden if norm is None else norm.reference(hidden)).to(self._model.dtype)
