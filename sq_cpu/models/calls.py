"""Batches as the arguments of a model's call, and a model ready to be called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.models.padding import Padding, padding_of
from sq_cpu.progress import track

__all__ = [
    "Batch",
    "Example",
    "called",
    "check_length",
    "copied",
    "evaluating",
    "example_of",
    "frozen",
    "is_cache",
    "model_inputs",
]

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""A tensor (a model's one positional argument), positional arguments, or keyword arguments."""

Example = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


def example_of(args: tuple[Any, ...], kwargs: dict[str, Any], padding: Padding) -> Example | None:
    """Copy a batch, with which folds can be proven; None where a sequence is padding alone.

    Of a batch of ids, with their masks and labels, it is the row with the least padding, as long as
    it came. Other batches stay whole: images may be packed, or belong to any row.
    """
    if padding.is_all:
        return None
    row = padding.fullest_row()
    rows = _rows_of_ids(args, kwargs)
    return copied((args, kwargs) if rows is None else rows(slice(row, row + 1)))


def _rows_of_ids(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[slice], Example] | None:
    """Return what cuts some rows from a batch of ids with their masks and labels; None: no such."""
    leaves = tree_leaves((args, kwargs))
    ids = next((x for x in leaves if isinstance(x, Tensor) and _is_ids(x) and x.dim() == 2), None)

    def has_rows(value: Tensor) -> bool:
        return ids is not None and value.dim() in (1, 2) and len(value) == len(ids)

    def belongs(value: Any) -> bool:
        """Whether the value is of ids, row by row, or of none."""
        if not isinstance(value, Tensor):
            return isinstance(value, bool | int | float | str | None)  # no cache
        if value.dim() == 2 and not _is_ids(value):
            return ids is not None and value.shape == ids.shape  # a mask
        return has_rows(value) or value.dim() == 0 or (value.dim() == 2 and len(value) == 1)

    def cut(rows: slice) -> Example:
        return tree_map_only(  # type: ignore[no-any-return]
            Tensor, lambda value: value[rows] if has_rows(value) else value, (args, kwargs)
        )

    return cut if ids is not None and all(map(belongs, leaves)) else None


def _is_ids(value: Tensor) -> bool:
    return not value.is_floating_point()


def copied(example: Example) -> Example:
    """Copy an example, which its model may write to: tensors, and what else it holds (a cache)."""
    copies: Example = tree_map(
        lambda value: value.detach().clone() if isinstance(value, Tensor) else deepcopy(value),
        example,
    )
    return copies


def model_inputs(
    model: nn.Module, batches: Iterable[Batch], what: str, doing: str, progress: bool | None
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield each batch as the model's arguments, positional and by keyword, under a progress bar.

    Of ids with a mask of as many rows as tokens, the last row is yielded by itself: else nobody
    could tell which of a tensor's axes is which in a model that works on [tokens, batch].

    Raises `SqCpuError` when there is no batch, or a batch is empty, of another type or longer than
    the model's context; messages call it batch number so and so of `what`.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise SqCpuError(
            f"batches is one {type(batches).__name__}; pass an iterable of batches, as in [batch]"
        )
    empty = True
    for index, batch in enumerate(track(batches, doing, progress)):
        empty = False
        args, kwargs = _arguments(batch, f"{what} batch {index}")
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.int64 and tensor.dim() == 2:
                check_length(model, tensor.shape[1], f"{what} batch {index}")
        rows = _rows_of_ids(args, kwargs)
        if rows is not None and padding_of(model, args, kwargs).is_square:
            yield rows(slice(-1))
            yield rows(slice(-1, None))
        else:
            yield args, kwargs
    if empty:
        raise SqCpuError(f"{what} got no batches: pass at least one (a generator runs once)")


def called(model: nn.Module, example: Example, what: str) -> Any:
    """Call the model; what its forward raises is an `SqCpuError` that begins with `what`."""
    args, kwargs = example
    try:
        return model(*args, **kwargs)
    except (SqCpuError, MemoryError):
        raise
    except Exception as error:  # whatever a model's own code raises
        raise SqCpuError(
            f"{what}: the model's forward fails ({type(error).__name__}: {first_line(error)}); "
            "give it what model(...) takes"
        ) from error


def is_cache(value: Any) -> bool:
    """Return whether a value is a cache of keys and values, as transformers has them."""
    return hasattr(value, "get_seq_length")


def check_length(model: nn.Module, length: int, what: str) -> None:
    """Raise `SqCpuError` when `what` has more tokens than the model's config has positions."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < length:
        raise SqCpuError(
            f"{what} has {length} tokens and the model {limit} positions: use shorter windows"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block with `model` in evaluation mode and without gradients; restore every module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Run a block in which the model's parameters get no gradients; restore each."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _arguments(batch: Any, what: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, tuple | list):
        args = tuple(batch)
    elif isinstance(batch, Mapping):
        kwargs = dict(batch)
    else:
        raise SqCpuError(
            f"{what} is a {type(batch).__name__}; "
            "a batch is a tensor, a tuple of positional or a dict of keyword arguments"
        )
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors:
        raise SqCpuError(
            f"{what} holds no tensor: a batch needs tensors, such as token ids "
            'from tokenizer(text, return_tensors="pt")'
        )
    if any(tensor.numel() == 0 for tensor in tensors):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise SqCpuError(f"{what} is empty ({shapes}): drop it")
    return args, kwargs
