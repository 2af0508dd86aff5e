"""The keys and values of a text's first tokens, as the float model makes them.

The first tokens of a text, its BOS above all, draw the attention of all others and carry massive
activations, which no static range fits. What other tokens see of them is their keys and values
alone, and these do not depend on what follows. So they are computed once, in float, and put in the
place of what an int8 model makes of such tokens (PrefixQuant, arXiv 2410.05265).

The tokens stay in the text: ids, positions, masks and shapes are what they are without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.kv_kinds import layer_count
from sq_cpu.inference.masks import token_runs
from sq_cpu.inference.requests import integers
from sq_cpu.models.bases import decoder_of
from sq_cpu.models.calls import called, evaluating
from sq_cpu.models.checks import check_ids, check_is_module, input_embeddings
from sq_cpu.models.families import family_of
from sq_cpu.models.hf_private import is_transformers
from sq_cpu.models.unchanged import unchanged
from sq_cpu.parsing import check_kind

__all__ = [
    "COPIES",
    "MOST_TOKENS",
    "NO_PREFIX",
    "Places",
    "Prefix",
    "PrefixedDecoder",
    "changing",
    "check_same",
    "decoder_with_cache",
    "make_prefix",
    "prefix_of",
    "prefix_tokens",
    "proving_text",
    "use_prefix",
]

Places = list[tuple[int, int]]
"""Numbers of sequences in a batch, and the position there at which each begins."""
NO_PREFIX = "the model can have no prefix in float"
_PROBE = 8  # tokens after the prefix, on which it is proven
COPIES = 2
"""Sequences of the prefix that run together: the product of one row and a weight depends, in its
last bits, on where in memory that lies."""
MOST_TOKENS = 8
"""Tokens of a prefix, which lies in one page of keys and values, and in the first call."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first tokens of texts, and what a float model makes of them."""

    ids: tuple[int, ...]
    keys: tuple[Tensor, ...]
    """Of each layer, as they go into a cache: float [kv_heads, tokens, channels]."""
    values: tuple[Tensor, ...]
    """Likewise."""
    hidden: Tensor
    """The base model's last hidden state, float [tokens, hidden_size]."""

    def leads(self, ids: Sequence[int]) -> bool:
        """Tell whether a text begins with these tokens."""
        return tuple(ids[: len(self.ids)]) == self.ids

    def places(self, ids: Any, mask: Any, positions: Tensor | None, *, absolute: bool) -> Places:
        """Return where sequences of a call begin with these tokens: number in the batch, position.

        Parameters
        ----------
        ids : int64 [batch, tokens], of a call that nothing has gone before
        mask : [batch, tokens], 0 at padding; None: there is none. Others tell nothing
        positions : int64 [1 or batch, tokens], 0 at each sequence's first token; None: counted from
            the first of the row, padding too
        absolute : whether keys depend on their positions, which then have to be 0, 1, ...
        """
        count = len(self.ids)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < count:
            return []
        leads = (ids.unfold(1, count, 1) == torch.tensor(self.ids)).all(dim=2)
        if absolute and positions is not None:
            if positions.dim() != 2 or positions.shape[1] != ids.shape[1]:
                return []
            begins = (positions.unfold(1, count, 1) == torch.arange(count)).all(dim=2)
            return [(row, begin) for row, begin in (leads & begins).nonzero().tolist()]
        first = [0] * len(ids)
        if mask is not None:
            known = isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == len(ids)
            runs = token_runs(mask, ids.shape[1]) if known else None
            if runs is None:
                return []
            first = runs[0] or first
        return [
            (row, begin)
            for row, begin in enumerate(first)
            if begin < leads.shape[1] and leads[row, begin] and not (absolute and begin)
        ]

    def put_into(self, k: Tensor, v: Tensor, layer: int, places: Places) -> Any:
        """Return keys and values [batch, kv_heads, tokens, channels] with the prefix's in them."""
        self.check_layer(layer, k.shape[1], k.shape[-1], v.shape[-1])
        k, v = k.clone(), v.clone()
        for row, begin in places:
            k[row, :, begin : begin + len(self.ids)] = self.keys[layer]
            v[row, :, begin : begin + len(self.ids)] = self.values[layer]
        return k, v

    def put_hidden(self, states: Tensor, places: Places) -> Tensor:
        """Return a last hidden state [batch, tokens, hidden_size] with the prefix's in it."""
        if states.shape[-1] != self.hidden.shape[1]:
            raise SqCpuError(
                f"the prefix has hidden states of {self.hidden.shape[1]} channels, the model of "
                f"{states.shape[-1]}: quantize the float model again"
            )
        states = states.clone()
        for row, begin in places:
            states[row, begin : begin + len(self.ids)] = self.hidden
        return states

    def check_layer(self, layer: int, kv_heads: int, k_dim: int, v_dim: int) -> None:
        """Raise `SqCpuError` unless a layer of the model has keys and values like the prefix's."""
        if layer < len(self.keys):
            heads, _, channels = self.keys[layer].shape
            if (heads, channels, self.values[layer].shape[2]) == (kv_heads, k_dim, v_dim):
                return
            has = f"{heads} kv heads of {channels} channels"
        else:
            has = "nothing"
        raise SqCpuError(
            f"the prefix has {has} for layer {layer}, the model {kv_heads} kv heads of {k_dim}: "
            "quantize the float model again"
        )


def make_prefix(model: nn.Module, ids: Sequence[int], *, prove: bool = True) -> Prefix:
    """Compute the prefix of a float model, and prove on a few tokens that it keeps the function.

    Parameters
    ----------
    model : a causal decoder of transformers, with a head or without
    ids : the first tokens, 1 to 8
    prove : whether to; not needed for a model that was proven, and folded since

    Raises
    ------
    SqCpuError
        That says why the model can have none: it is no decoder of transformers, a layer keeps
        something else than keys and values of its own in a cache, or other tokens see more of these
        than that.
    """
    check_is_module(model)
    base = decoder_with_cache(model)
    forward = base.forward.plain if isinstance(base.forward, PrefixedDecoder) else base.forward
    tokens = prefix_tokens(model, ids)
    ids = tuple(tokens[0].tolist())

    def run(tokens: Tensor, change: Callable[[Tensor, Tensor, int], Any]) -> Tensor:
        cache = DynamicCache(config=base.config)
        with changing(cache, change):
            given = {"input_ids": tokens, "past_key_values": cache, "use_cache": False}
            output = called(forward, ((), given), "the prefix")
        states: Tensor = output.last_hidden_state
        return states[0]

    made: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(k: Tensor, v: Tensor, layer: int) -> Any:
        if k.dim() != 4 or len(k) != COPIES or k.shape[2] != len(ids) or layer in made:
            raise SqCpuError(f"{NO_PREFIX}: layer {layer} keeps keys of the shape {[*k.shape]}")
        made[layer] = k[0].detach().clone(), v[0].detach().clone()
        return k, v

    with unchanged(model), evaluating(model):
        hidden = run(tokens.expand(COPIES, -1), keep).clone()
        layers = len(DynamicCache(config=base.config).layers)
        if not made or [*made] != [*range(layers)]:
            raise SqCpuError(
                f"{NO_PREFIX}: {len(made)} of its {layers} layers keep keys and values of their own"
            )
        keys, values = zip(*made.values(), strict=True)
        prefix = Prefix(ids, keys, values, hidden)
        if not prove:
            return prefix
        text = proving_text(model, tokens)
        plain = run(text, lambda k, v, _: (k, v))[len(ids) :]
        same = run(text, lambda k, v, layer: prefix.put_into(k, v, layer, [(0, 0)]))[len(ids) :]

        def silenced(k: Tensor, v: Tensor, _: int) -> Any:
            return k, torch.cat([torch.zeros_like(v[:, :, : len(ids)]), v[:, :, len(ids) :]], 2)

        without = run(text, silenced)[len(ids) :]
    check_same(same, plain, without)
    return prefix


def prefix_tokens(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Return a prefix as a call's ids, int64 [1, tokens]; `SqCpuError` for what cannot be one."""
    given = integers(ids, "the prefix")
    if not 1 <= len(given) <= MOST_TOKENS:
        raise SqCpuError(
            f"the prefix has {len(given)} tokens; it has 1 to {MOST_TOKENS}, as "
            "leading_ids(tokenizer) gives them"
        )
    tokens = torch.tensor([given])
    table: Any = input_embeddings(model)
    check_ids(table, "the model's embeddings", tokens)
    return tokens


def proving_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return a text that begins with a prefix, to prove that on."""
    table: Any = input_embeddings(model)
    after = torch.linspace(0, table.weight.shape[0] - 1, _PROBE).long()[None]
    return torch.cat([tokens, after], dim=1)


def check_same(same: Tensor, plain: Tensor, without: Tensor) -> None:
    """Raise `SqCpuError` unless a text goes on after a prefix as it does without one.

    `same` are its states with the prefix, and `without` those with other values in its place.
    """
    # Both are sums of the same products, in another order.
    bound = min(0.1, 4096 * torch.finfo(plain.dtype).eps)
    if not float((same - plain).float().norm()) <= bound * float(plain.float().norm()):
        raise SqCpuError(
            f"{NO_PREFIX}: the keys and values of its first tokens depend on later ones"
        )
    if torch.equal(without, plain):
        raise SqCpuError(f"{NO_PREFIX}: its attention does not read what a cache returns")


def use_prefix(model: nn.Module, prefix: Prefix | None) -> None:
    """Have a decoder take a prefix's keys and values for its own where a text begins with it.

    That is in calls without a cache, or with an empty one of any class, of ids whose mask, if any,
    is of padding before or behind; a sequence whose first token is not at position 0 (padding in
    front, and no `position_ids`) runs without, unless the model has no positions but distances, or
    counts them from each text's first token by itself (OPT).
    It looks at the ids, so a model that is exported or compiled whole has to do without.

    Parameters
    ----------
    model : that `make_prefix` made it of, quantized since or not; not fused
    prefix : None undoes it

    Raises
    ------
    SqCpuError
        For a fused model, and one that is no decoder of transformers.
    """
    check_is_module(model)
    check_kind(Prefix | None, "a Prefix, as make_prefix gives it", prefix=prefix)
    base: Any = decoder_of(model)
    held = base.__dict__.get("forward")
    if hasattr(held, "program"):
        raise SqCpuError("the model is fused: fuse(model, enabled=False) first, and again after")
    if isinstance(held, PrefixedDecoder):
        held.undo()
    if prefix is not None:
        decoder_with_cache(model).forward = PrefixedDecoder(base, prefix)


def prefix_of(model: nn.Module) -> Prefix | None:
    """Return the prefix that a model uses, fused or not; None: it has none."""
    check_is_module(model)
    forward = decoder_of(model).__dict__.get("forward")
    prefix = getattr(forward, "prefix", None)
    return prefix if isinstance(prefix, Prefix) else None


class PrefixedDecoder:
    """The forward of a base model that has a prefix.

    Attributes
    ----------
    same_function : True, which tells `save` that the model is what it was
    prefix : what it uses
    plain : the forward that the base had
    absolute : whether keys depend on their positions
    own_positions : whether those that a call does not give count from each text's first token
    """

    same_function = True

    def __init__(self, base: Any, prefix: Prefix) -> None:
        self.prefix = prefix
        self._base = base
        self._before = base.__dict__.get("forward")
        self.plain = base.forward
        self._paused = False
        self._names = tuple(inspect.signature(self.plain).parameters)
        self.absolute = "position_ids" in self._names
        family = family_of(base)
        decoder = None if family is None else family.decoder
        self.own_positions = decoder is not None and decoder.own_positions

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do without the prefix in a block."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def undo(self) -> None:
        """Give the base model the forward that it had."""
        del self._base.forward
        if self._before is not None:
            self._base.forward = self._before

    def places(self, ids: Any, mask: Any, positions: Tensor | None) -> Places:
        """Return where a call that nothing has gone before gets the prefix: see `Prefix.places`."""
        if self._paused:
            return []
        begins_at_0 = positions is None and self.own_positions  # wherever the first token is
        absolute = self.absolute and not begins_at_0
        return self.prefix.places(ids, mask, positions, absolute=absolute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base model does."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        places: Places = []
        if cache is None or not cache.get_seq_length():
            kinds = ("input_ids", "attention_mask", "position_ids")
            places = self.places(*map(given.get, kinds))
        if not places:
            return self.plain(*args, **kwargs)
        config = self._base.config
        wanted, as_tuple = given.get("use_cache"), given.get("return_dict")
        wanted = getattr(config, "use_cache", True) if wanted is None else wanted
        as_tuple = (config.return_dict if as_tuple is None else as_tuple) is False
        # A caller that asked for no cache would go on with the one that the model was given.
        drops = cache is None and not wanted
        if cache is None:
            cache = DynamicCache(config=config)

        def change(k: Tensor, v: Tensor, layer: int) -> Any:
            return self.prefix.put_into(k, v, layer, places)

        with changing(cache, change):
            output = self.plain(**given | {"past_key_values": cache, "return_dict": True})
        fields = dict(output.items())
        if drops:
            fields.pop("past_key_values", None)
        hidden = fields["last_hidden_state"]
        fields["last_hidden_state"] = self.prefix.put_hidden(hidden, places)
        if states := fields.get("hidden_states"):  # those within are the model's own
            fields["hidden_states"] = (*states[:-1], fields["last_hidden_state"])
        made = type(output)(**fields)
        return made.to_tuple() if as_tuple else made


@contextmanager
def changing(cache: Cache, change: Callable[[Tensor, Tensor, int], Any]) -> Iterator[None]:
    """Have a cache take other keys and values than it is given, in a block."""
    update = cache.update

    def changed(k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return update(*change(k, v, layer_idx), layer_idx, *args, **kwargs)

    cache.update = changed
    try:
        yield
    finally:
        del cache.update


def decoder_with_cache(model: nn.Module) -> Any:
    """Return the base model of a decoder; `SqCpuError` for one that can have no prefix."""
    if not is_transformers(model):
        raise SqCpuError(f"{NO_PREFIX}: {type(model).__name__} is no model of transformers")
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise SqCpuError(
            f"{NO_PREFIX}: its decoder also sees an encoder, whose text differs; leave the prefix "
            "out"
        )
    base: Any = decoder_of(model)
    plain = getattr(base.forward, "plain", base.forward)
    names = inspect.signature(plain).parameters
    if not {"input_ids", "past_key_values"} <= names.keys():
        raise SqCpuError(f"{NO_PREFIX}: {type(base).__name__} takes no ids, or no cache")
    layer_count(base.config)
    return base
