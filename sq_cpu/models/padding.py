"""Whose mask it is: which rows of a tensor, within one call of a model, stand for padding.

A model may take several sequences: an encoder's and a decoder's, a text and images. A mask is of
one of them. Its shape may fit the others too, so it is not the shape that tells whose rows a linear
gets, but from which of the arguments these were computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sq_cpu.models.hooks import hooked

__all__ = ["Padding", "padding_of"]

_MASK = "attention_mask"
_DECODER = "decoder_"
_TOKENS = ("input_ids", "inputs_embeds")
_MASKED = -1000.0  # what is added to a score that shall vanish is less; a bias is more


@dataclass(frozen=True, eq=False)
class _Sequence:
    """The arguments that hold one sequence, and its mask."""

    sources: tuple[Tensor, ...]
    kept: Tensor | None
    """Which positions are no padding, bool [batch, tokens]; None: all."""


class Padding:
    """Which rows stand for padding, in one call of a model.

    Where sequences meet, the rows are those of the first: a decoder's, though they have looked at
    what an encoder gives.
    """

    def __init__(
        self, sequences: Mapping[str, _Sequence] | None = None, decoder: nn.Module | None = None
    ) -> None:
        self._sequences = sequences or {}
        self._decoder = decoder
        self._origins = _Origins()

    @property
    def masks(self) -> bool:
        """Whether any position is padding."""
        return any(sequence.kept is not None for sequence in self._sequences.values())

    @property
    def is_all(self) -> bool:
        """Whether some sequence is nothing but padding."""
        return any(s.kept is not None and not s.kept.any() for s in self._sequences.values())

    @property
    def is_square(self) -> bool:
        """Whether a mask has as many rows as tokens: its shape does not tell which is which."""
        masks = (s.kept for s in self._sequences.values() if s.kept is not None)
        return any(kept.shape[0] == kept.shape[1] > 1 for kept in masks)

    def fullest_row(self) -> int:
        """Return the row of the batch with the least padding, of the first sequence with some."""
        masked = (s.kept for s in self._sequences.values() if s.kept is not None)
        kept = next(masked, None)
        return 0 if kept is None else int(kept.sum(dim=1).argmax())

    def kept(self, x: Tensor) -> Tensor | None:
        """Return which rows of x [..., features] are no padding, bool [rows]; None: all.

        It is known while `tracing`, of what the model makes then. Where a mask `is_square`, rows
        of x [tokens, batch, features] are taken for those of [batch, tokens, features].
        """
        origin = self._origins.of(x)
        if not origin:
            return None
        first = (origin & -origin).bit_length() - 1
        kept = list(self._sequences.values())[first].kept
        if kept is None:
            return None
        # OPT hands its MLP [batch * sequence, features], XLNet has [sequence, batch, features].
        if x.shape[:-1] in (kept.shape, (kept.numel(),)):
            return kept.reshape(-1)
        return kept.T.reshape(-1) if x.shape[:-1] == kept.T.shape else None

    def with_prefix(self, prefix: Sequence[int]) -> Padding:
        """Return this padding with the first tokens of each text that begins with these ids."""
        sequence = self._sequences.get("")
        ids = [x for x in sequence.sources if _are_ids(x)] if sequence is not None else []
        if sequence is None or not ids or not prefix or ids[0].shape[1] < len(prefix):
            return self
        kept = torch.ones_like(ids[0], dtype=torch.bool) if sequence.kept is None else sequence.kept
        begin = kept.int().argmax(dim=1, keepdim=True)
        place = (begin + torch.arange(len(prefix))).clamp(max=ids[0].shape[1] - 1)
        leads = (ids[0].gather(1, place) == torch.tensor(prefix)).all(dim=1, keepdim=True)
        if not leads.any():
            return self
        kept = kept.scatter(1, place, kept.gather(1, place) & ~leads)
        return Padding({**self._sequences, "": replace(sequence, kept=kept)}, self._decoder)

    def of_hidden(self, hidden: Tensor, block: nn.Module) -> Padding:
        """Return the padding of a call that goes on with hidden states, which a block takes."""
        inside = self._decoder is not None and block in set(self._decoder.modules())
        prefix = _DECODER if inside else ""
        sequence = self._sequences.get(prefix, _Sequence((), None))
        going_on = replace(sequence, sources=(*sequence.sources, hidden))
        return Padding({**self._sequences, prefix: going_on}, self._decoder)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Run a block that calls the model, and follow what it makes of its arguments."""
        if not self.masks:
            yield
            return
        for bit, sequence in enumerate(self._sequences.values()):
            for source in sequence.sources:
                self._origins.begin(source, 1 << bit)
        try:
            with ExitStack() as stack:
                if self._decoder is not None:
                    stack.enter_context(hooked(before=[(self._decoder, self._begin_decoder)]))
                stack.enter_context(_Tracer(self._origins))
                yield
        finally:
            self._origins = _Origins()

    def _begin_decoder(self, decoder: nn.Module, args: Any, kwargs: Any) -> None:
        # Its ids may be made of the encoder's (BART), or be the same tensor.
        given = _arguments(decoder, args, kwargs)
        for name in _TOKENS:
            if isinstance(given.get(name), Tensor):
                self._origins.begin(given[name], 1)  # a decoder's sequence is the first


class _Origins:
    """From which sequences tensors were made, as one bit for each."""

    def __init__(self) -> None:
        self._sources: dict[tuple[int, int], int] = {}
        self._made: dict[int, int] = {}  # by storage, which views share
        self._held: list[Tensor] = []  # so that no other tensor gets a source's place

    def begin(self, source: Tensor, origin: int) -> None:
        """Note what a sequence begins with; others in the same storage (a file) are not meant."""
        self._held.append(source)
        self._sources[_storage(source), int(source.storage_offset())] = origin

    def of(self, tensor: Tensor) -> int:
        storage = _storage(tensor)
        found = self._sources.get((storage, int(tensor.storage_offset())))
        return self._made.get(storage, 0) if found is None else found

    def made(self, tensor: Tensor, origin: int) -> None:
        """Note a result. That it may be in the place of one that is gone does no harm."""
        self._made[_storage(tensor)] = origin


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes of every tensor that is made from which sequences it was."""

    supports_higher_order_operators = True  # flex attention, which compiles itself

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled parts of the model run as they are."""
        return True

    def __init__(self, origins: _Origins) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._origins = origins

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        origin = 0
        for tensor in _tensors((args, tuple(kwargs.values()))):
            origin |= self._origins.of(tensor)
        for tensor in _tensors((result,)):
            self._origins.made(tensor, origin)
        return result


def padding_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Padding:
    """Return the padding of one call of a model.

    A mask is the argument `attention_mask`: that of `input_ids` or `inputs_embeds` (without these,
    of what has its two dimensions first); with a prefix, as in `decoder_attention_mask`, it is that
    of the arguments with this prefix. It is [batch, tokens], 0 for padding; or [batch, queries,
    tokens] or [batch, heads, queries, tokens], and padding is what no query sees. The latter may
    also be what is added to scores: 0, and large negative numbers.
    """
    given = _arguments(model, args, kwargs)
    masks = {n.removesuffix(_MASK): v for n, v in given.items() if n.endswith(_MASK)}
    given = {name: value for name, value in given.items() if not name.endswith(_MASK)}
    decoder = _decoder(model)
    if decoder is not None and "labels" in given:  # of which the decoder's ids may be made
        given[f"{_DECODER}labels"] = given.pop("labels")
    first = [_DECODER] if decoder is not None or _DECODER in masks else []
    prefixes = dict.fromkeys((*first, "", *masks))
    others = tuple(prefix for prefix in prefixes if prefix)
    sequences = {}
    for prefix in prefixes:
        names = [n for n in given if (n.startswith(prefix) if prefix else not n.startswith(others))]
        tokens = [n for n in names if n.removeprefix(prefix) in _TOKENS and given[n] is not None]
        leaves = tree_leaves([given[name] for name in tokens or names])
        sources = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kept = _kept(masks.get(prefix))
        if kept is not None:
            sources = [each for each in sources if each.shape[:2] == kept.shape]
            kept = None if kept.all() or not sources else kept
        sequences[prefix] = _Sequence(tuple(sources), kept)
    return Padding(sequences, decoder)


def _kept(mask: Any) -> Tensor | None:
    """Return which positions a mask keeps, bool [batch, tokens]; None where that is no mask."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        return None
    if mask.dim() == 2:
        return mask.bool()
    added = mask.is_floating_point() and not (mask > 0).any()
    seen = mask > _MASKED if added else mask.bool()
    return seen.flatten(1, -2).any(dim=1)


def _are_ids(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point()


def _arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by name; without the positional ones where it would fail."""
    signature = inspect.signature(module.forward)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return dict(kwargs)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return dict(given)


def _decoder(model: nn.Module) -> nn.Module | None:
    """Return the decoder of a model that has an encoder too."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            found: Any = getattr(module, "get_decoder", lambda: None)()
            return found if isinstance(found, nn.Module) and found is not module else None
    return None


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among an operator's arguments, or results."""
    for value in values:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
