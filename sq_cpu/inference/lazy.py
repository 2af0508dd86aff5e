"""Tensors that are computed when an operation reads them.

What knows of them reads what they stand for instead: int8 attention takes the pages of keys and the
pattern of a mask. Anything else sees an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["LazyTensor"]


class LazyTensor(Tensor):
    """A tensor of a known shape and dtype on the CPU, which `compute` makes.

    `source` is what it stands for.
    """

    source: Any
    _compute: Callable[[], Tensor]
    _value: Tensor | None

    # Its shape and dtype are read without a detour.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(  # noqa: D102
        cls, shape: Sequence[int], dtype: torch.dtype, source: Any, compute: Callable[[], Tensor]
    ) -> LazyTensor:
        cpu = torch.device("cpu")
        made: LazyTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=cpu)
        made.source, made._compute, made._value = source, compute, None
        return made

    def __init__(self, *_: Any) -> None:
        pass

    def materialize(self) -> Tensor:
        """Return the ordinary tensor."""
        if self._value is None:
            self._value = self._compute()
        return self._value

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run any operation on the ordinary tensors."""

        def plain(x: Any) -> Any:
            return x.materialize() if isinstance(x, LazyTensor) else x

        return func(*tree_map(plain, args), **tree_map(plain, dict(kwargs or {})))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.materialize().clone()
