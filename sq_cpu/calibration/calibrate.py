"""One pass over sample text: the range of every input channel of every linear.

The ranges serve every later choice: a smoothing plan divides channel j by s_j > 0, so the range
after smoothing is the range here / s, exactly, and no second pass is needed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sq_cpu.calibration.calibration import FOLDS, TENSORS, Calibration, Example, fingerprint
from sq_cpu.calibration.gradients import differentiating, sampled_loss
from sq_cpu.calibration.sampling import InputRows, Reservoir, watching_inputs
from sq_cpu.errors import SqCpuError
from sq_cpu.models.linears import check_ignore, linearized, quantizable_linears
from sq_cpu.progress import track

__all__ = [
    "SAMPLED_ROWS",
    "TUNING_ROWS",
    "Batch",
    "Calibration",
    "Example",
    "InputRanges",
    "calibrate",
    "check_length",
    "evaluating",
    "example_of",
    "model_inputs",
]

_EXAMPLE_TOKENS = 32
SAMPLED_ROWS = 64
TUNING_ROWS = 384
"""Rows a linear, with gradients, that suffice for `tune`."""

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    ignore: tuple[str, ...] = ("lm_head",),
    rows: int = SAMPLED_ROWS,
    gradient_rows: int = 0,
    progress: bool | None = None,
) -> Calibration:
    """Run `model` over `batches` and record the input range of every linear not ignored.

    Beside the range, a uniform sample of at most `rows` input rows is kept of each linear, of
    rows * in_features elements. With `gradient_rows` each batch is also run backward, and of each
    linear at most so many rows are kept with the gradient of the model's loss with respect to its
    output, which tells `tune` what an error there costs: those where it would cost most, as a
    rule, and weights by which all others are counted. They are gradient_rows * (in_features +
    out_features) elements; a batch takes three times the time, and the memory of its graph and of
    a copy of every linear's input and output. Of linears that the model runs without gradients
    none are kept.

    A batch is a tensor (the model's one positional argument), a tuple or list (positional
    arguments) or a mapping (keyword arguments). Positions that a mapping's two-dimensional
    `attention_mask` masks with 0 are padding and are not counted. The model runs in evaluation mode
    without gradients and is left as it was. `progress=None` shows a bar when stderr is a terminal.

    Raises `SqCpuError` when there is no batch, or a batch is empty, of another type or longer than
    the model's context, when an activation or gradient is NaN or infinite, when the model has no
    linear, for negative `rows` or `gradient_rows`, and for an entry of `ignore` that matches none.
    """
    with linearized(model):
        return _calibrate(model, batches, ignore, rows, gradient_rows, progress)


def _calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    ignore: tuple[str, ...],
    rows: int,
    gradient_rows: int,
    progress: bool | None,
) -> Calibration:
    if min(rows, gradient_rows) < 0:
        raise SqCpuError(f"rows={rows}, gradient_rows={gradient_rows}: a number of rows is >= 0")
    check_ignore(model, ignore)
    linears = quantizable_linears(model, ignore)
    if not linears:
        raise SqCpuError(f"nothing to calibrate: no Linear in the model beside {ignore}")
    ranges = InputRanges(linears, rows, gradient_rows)
    example: Example | None = None
    labels = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(ranges.watching())
        if gradient_rows:
            stack.enter_context(differentiating(model, linears, ranges.see_gradients))
        for args, kwargs in model_inputs(model, batches, "calibration", "calibrating", progress):
            example = example or example_of(args, kwargs)
            mask = kwargs.get("attention_mask")
            with ranges.batch(mask):
                outputs = model(*args, **kwargs)
                if gradient_rows:
                    torch.autograd.backward(sampled_loss(outputs, mask, labels))
    return ranges.calibration(example)


def example_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    """Copy a batch; if it is sequences of ids (masks, labels) of one length, its first tokens only.

    Beside images or embeddings the ids stay whole: some of them may stand for these.
    """

    def is_ids(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()

    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    lengths = {value.shape[1] for value in tensors if is_ids(value)}
    ids_alone = all(is_ids(value) or value.dim() < 2 for value in tensors) and len(lengths) == 1

    def cut(value: Any) -> Any:
        if ids_alone and is_ids(value):
            return value[:, :_EXAMPLE_TOKENS].clone()
        return value.detach().clone() if isinstance(value, Tensor) else value

    return tuple(map(cut, args)), {key: cut(value) for key, value in kwargs.items()}


def model_inputs(
    model: nn.Module, batches: Iterable[Batch], what: str, doing: str, progress: bool | None
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield each batch as the model's arguments, positional and by keyword, under a progress bar.

    Raises `SqCpuError` when there is no batch, or a batch is empty, of another type or longer than
    the model's context; messages call it batch number so and so of `what`.
    """
    if isinstance(batches, Tensor | Mapping | str):
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
        yield args, kwargs
    if empty:
        raise SqCpuError(f"{what} got no batches: pass at least one (a generator runs once)")


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


class _Seen:
    """What was seen of one linear: the range of its input channels, and samples of its rows."""

    def __init__(self, name: str, linear: nn.Linear, rows: int, gradient_rows: int) -> None:
        self.name = name
        self.linear = linear
        self.rows = 0
        self.sample = Reservoir(rows)
        self.costly = Reservoir(gradient_rows)
        self.differentiated = False
        # The same seed for all: linears that share an input keep the same rows.
        self.generator = torch.Generator().manual_seed(0)
        # Another one each: what chance adds to the loss of one linear evens out over all.
        self.gradient_generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.low = torch.full((FOLDS, linear.in_features), torch.inf)
        self.high = torch.full((FOLDS, linear.in_features), -torch.inf)

    def add(self, x: Tensor, recent: InputRows) -> None:
        recent.look(x)
        first, self.rows = self.rows, self.rows + len(recent.rows)
        if not len(recent.rows):  # an expert that no token was routed to, or all padding
            return
        if not (recent.low.isfinite().all() and recent.high.isfinite().all()):
            raise SqCpuError(
                f"calibration batch {recent.batch}: NaN or Inf in the input of {self.name}; "
                "check the batch and the model's weights"
            )
        fold = recent.batch % FOLDS
        torch.minimum(self.low[fold], recent.low, out=self.low[fold])
        torch.maximum(self.high[fold], recent.high, out=self.high[fold])
        chance = torch.rand(len(recent.rows), generator=self.generator)
        self.sample.add(
            chance,
            rows=recent.rows,
            fold=_all_of(fold, recent.rows),
            place=torch.arange(first, self.rows),
        )

    def gradient_taker(self, recent: InputRows) -> Callable[[Tensor], None]:
        """Return what takes the gradient of the output whose input was added last.

        Rows are drawn by priority sampling (Duffield, Lund, Thorup 2007), which needs one pass: a
        row of size w has priority w / u, u uniform in (0, 1], and if kept counts
        max(1, threshold / w) times. Sums over rows are unbiased, of little variance where w grows
        with a row's share of them: so w is |gradient| times how near the row comes to the ends of
        the channels' ranges, as what clips there, or sets a coarse scale, is few rows.
        """
        self.differentiated = True
        rows, kept = recent.copy(), recent.kept
        batch, fold = recent.batch, recent.batch % FOLDS
        places = torch.arange(self.rows - len(rows), self.rows)
        ends = torch.maximum(-self.low.amin(dim=0), self.high.amax(dim=0))
        near = (rows.abs() / ends.clamp_min(1e-30)).amax(dim=1).float()

        def take(gradient: Tensor) -> None:
            of_rows = gradient.detach().reshape(-1, gradient.shape[-1])
            of_rows = of_rows if kept is None else of_rows[kept]
            size = of_rows.float().norm(dim=1) * near
            if not size.isfinite().all():
                raise SqCpuError(
                    f"calibration batch {batch}: NaN or Inf in the gradient of {self.name}; "
                    "calibrate in fp32 or bf16"
                )
            chance = 1 - torch.rand(len(size), generator=self.gradient_generator)
            self.costly.add(
                size / chance,
                rows=rows,
                gradient=of_rows,
                size=size,
                fold=_all_of(fold, rows),
                place=places,
            )

        return take

    # Each of these by the names of the fields of a `Calibration`.

    def ranges(self) -> dict[str, Tensor]:
        """Return the range of every channel, over all and in each fold."""
        return {
            "channel_min": self.low.amin(dim=0),
            "channel_max": self.high.amax(dim=0),
            "fold_min": self.low,
            "fold_max": self.high,
        }

    def sampled(self) -> dict[str, Tensor]:
        """Return the uniform sample; nothing, if none was asked for."""
        if not self.sample.size:
            return {}
        column = self.sample.columns
        return {
            "rows": column["rows"],
            "row_folds": column["fold"],
            "row_places": column["place"],
        }

    def gradients(self) -> dict[str, Tensor]:
        """Return rows with gradients; nothing where the model ran without them."""
        if not self.differentiated:
            return {}
        column = self.costly.columns
        if not column:  # nothing that the model gives depends on this linear
            none = self.linear.weight.detach()[:0]
            column = {
                "rows": none,
                "gradient": none.new_empty(0, self.linear.out_features),
                "size": torch.empty(0),
                "fold": _all_of(0, none),
                "place": torch.arange(0),
            }
        # 0 / 0 is of rows that cost nothing, when all that do are kept.
        weights = (self.costly.threshold / column["size"]).nan_to_num(1.0).clamp_min(1.0)
        return {
            "gradient_rows": column["rows"],
            "gradients": column["gradient"],
            "gradient_weights": weights,
            "gradient_folds": column["fold"],
            "gradient_places": column["place"],
        }


def _all_of(fold: int, rows: Tensor) -> Tensor:
    return torch.full((len(rows),), fold, dtype=torch.uint8)


class InputRanges:
    """Gathers a `Calibration` of linears, batch by batch, from whatever runs them."""

    def __init__(self, linears: Mapping[str, nn.Linear], rows: int, gradient_rows: int = 0) -> None:
        self._linears = linears
        self._ranges = {
            name: _Seen(name, linear, rows, gradient_rows) for name, linear in linears.items()
        }
        self._recent = InputRows()
        self._batches = 0

    def _see(self, name: str, x: Tensor) -> None:
        self._ranges[name].add(x, self._recent)

    def watching(self) -> AbstractContextManager[None]:
        """Return a context in which the inputs of the linears are seen."""
        return watching_inputs(self._linears, "input", self._see)

    def see_gradients(self, name: str) -> Callable[[Tensor], None]:
        """Return what takes the gradient of a linear's output, right after the linear ran."""
        return self._ranges[name].gradient_taker(self._recent)

    @contextmanager
    def batch(self, mask: Any) -> Iterator[None]:
        """Run one batch; `mask`, if it is a tensor [batch, tokens], has 0 for padding."""
        self._recent.begin(self._batches, mask)
        yield
        self._recent.forget()
        self._batches += 1

    def calibration(self, example: Example | None = None) -> Calibration:
        """Return what was seen so far."""
        reached = {name: seen for name, seen in self._ranges.items() if seen.rows}
        tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in TENSORS}
        for name, seen in reached.items():
            for kind, tensor in (seen.ranges() | seen.sampled() | seen.gradients()).items():
                tensors[kind][name] = tensor
        return Calibration(
            **tensors,
            fingerprints={name: fingerprint(self._linears[name]) for name in reached},
            rows_seen={name: seen.rows for name, seen in reached.items()},
            tokens=max((seen.rows for seen in reached.values()), default=0),
            batches=self._batches,
            unreached=tuple(name for name in self._ranges if name not in reached),
            example=example,
        )


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
