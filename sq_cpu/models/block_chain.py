"""A model as a chain: what precedes its blocks, and the blocks, each fed by the one before.

What a block is called with beside the hidden states (masks, positions) is captured once, from a
forward whose blocks hand on what they get; then the blocks can be run one by one, each as it was
or changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.models.calls import Example
from sq_cpu.models.families import family_of
from sq_cpu.models.groups import stack_paths
from sq_cpu.models.padding import Padding, padding_of

__all__ = ["BlockCalls", "BlockChain"]


@dataclass
class BlockCalls:
    """What one batch calls each block with, beside the hidden states."""

    arguments: Example
    """Of the model."""
    padding: Padding
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    """What the first block takes."""
    blocks: list[Example] = field(default_factory=list)

    def take(self) -> Tensor:
        """Return `hidden`, and let go of it."""
        hidden, self.hidden = self.hidden, torch.empty(0)
        return hidden


class _Captured(Exception):  # noqa: N818  ends a forward whose rest is not needed
    """All that was asked of a forward is known."""


class BlockChain:
    """The blocks of a model that has one stack of them.

    Parameters
    ----------
    otherwise : str
        The advice that ends the message where a model is no chain.

    Raises
    ------
    SqCpuError
        For a model with no stack of blocks, or several.
    """

    def __init__(self, model: nn.Module, otherwise: str) -> None:
        self.model = model
        self.otherwise = otherwise
        self.names = self._block_names()
        self.outputs = 0
        """Length of the tuple that a block returns; 0: a tensor. Known after `probe`."""

    def _block_names(self) -> list[str]:
        """Return the full names, of the family's stack or else of the largest list of likes."""
        model = self.model
        family = family_of(model)
        if family is not None:
            modules = dict(model.named_modules())
            # A family lists where its stacks may be, as in models with and without a vision tower.
            paths = [path for path in stack_paths(model, family) if path in modules]
            if len(paths) != 1:
                raise self._refused(f"has {len(paths)} stacks of blocks")
            path = paths[0]
        else:
            lists = {
                name: sum(parameter.numel() for parameter in module.parameters())
                for name, module in model.named_modules()
                if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
            }
            if not lists:
                raise self._refused("has no list of like blocks")
            path = max(lists, key=lambda name: lists[name])
        return [f"{path}.{key}" for key, _ in model.get_submodule(path).named_children()]

    def _refused(self, what: str) -> SqCpuError:
        return SqCpuError(f"{type(self.model).__name__} {what}; {self.otherwise}")

    def _not_a_chain(self) -> SqCpuError:
        return self._refused(
            "does not hand the hidden states from each block to the next and nothing else"
        )

    def probe(self, batch: Example) -> int:
        """Call the first block and return `outputs`, which is then known."""
        call = self._call(batch)
        self._forward(call, stop=1)
        args, kwargs = call.blocks[0]
        output = self.model.get_submodule(self.names[0])(call.hidden, *args, **kwargs)
        self.outputs = len(output) if isinstance(output, tuple) else 0
        return self.outputs

    def capture(self, batches: Sequence[Example]) -> list[BlockCalls]:
        """Run what precedes the blocks, not the blocks themselves, and return what calls them.

        Raises `SqCpuError` for blocks that get more from each other than the hidden states.
        """
        calls = [self._call(batch) for batch in batches]
        for call in calls:
            self._forward(call, stop=len(self.names))
            if len(call.blocks) != len(self.names):
                raise self._not_a_chain()
        return calls

    def run(self, index: int, call: BlockCalls, hidden: Tensor) -> Tensor:
        """Call a block, as it stands in the model, and return the hidden states it makes."""
        args, kwargs = call.blocks[index]
        output = self.model.get_submodule(self.names[index])(hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def padding(self, index: int, call: BlockCalls, hidden: Tensor) -> Padding:
        """Return which rows are padding when a block is called with these hidden states."""
        return call.padding.of_hidden(hidden, self.model.get_submodule(self.names[index]))

    @contextmanager
    def replaced(self, take: Callable[..., Tensor]) -> Iterator[None]:
        """Have take(index, hidden, args, kwargs) in the place of every block."""

        def stub(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if args:
                    hidden = take(index, args[0], args[1:], kwargs)
                else:
                    hidden = take(index, kwargs.pop("hidden_states"), (), kwargs)
                return (hidden, *[None] * (self.outputs - 1)) if self.outputs else hidden

            return forward

        blocks: list[Any] = [self.model.get_submodule(name) for name in self.names]
        for index, block in enumerate(blocks):
            block.forward = stub(index)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _call(self, batch: Example) -> BlockCalls:
        args, kwargs = batch
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            kwargs = kwargs | {"use_cache": False}
        return BlockCalls((args, kwargs), padding_of(self.model, args, kwargs))

    def _forward(self, call: BlockCalls, stop: int) -> None:
        """Run the model up to a block, the blocks before handing on what they get."""

        def take(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index == 0:
                call.hidden = hidden
            if index != len(call.blocks) or hidden is not call.hidden:
                raise self._not_a_chain()
            call.blocks.append((args, kwargs))
            if len(call.blocks) == stop:
                raise _Captured
            return hidden

        with self.replaced(take):
            args, kwargs = call.arguments
            with suppress(_Captured):
                self.model(*args, **kwargs)
