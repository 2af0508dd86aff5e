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

from sq_cpu.calibration import FOLDS, Calibration, Example, fingerprint
from sq_cpu.errors import SqCpuError
from sq_cpu.linears import check_ignore, linearized, quantizable_linears
from sq_cpu.progress import track
from sq_cpu.sensitivity import differentiating, sampled_loss

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
    "watching_inputs",
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


class _Recent:
    """The input seen last and its range: q, k and v are handed the same tensor in a row."""

    batch = 0
    mask: Tensor | None = None
    key: tuple[int, int] | None = None
    held: Tensor | None = None  # keeps the address from being reused while the key stands
    rows: Tensor
    kept: Tensor | None = None
    """Which rows of x are no padding, bool; None: all."""
    copied: Tensor | None = None
    low: Tensor
    high: Tensor

    def begin(self, batch: int, mask: Any) -> None:
        self.batch = batch
        padded = isinstance(mask, Tensor) and mask.dim() == 2 and not mask.all()
        self.mask = mask.bool() if padded else None

    def forget(self) -> None:
        self.key = self.held = self.copied = None
        self.rows = torch.empty(0)

    def look(self, x: Tensor) -> None:
        """Set `rows` to x without padding, [rows, in_features], and `low` and `high` to theirs."""
        # Inference tensors have no version that would show an in-place change: never cached.
        key = None if x.is_inference() else (id(x), x._version)
        if key is not None and key == self.key:
            return
        self.rows = x.detach().reshape(-1, x.shape[-1])
        # OPT hands its MLP [batch * sequence, features].
        self.kept = None
        if self.mask is not None and x.shape[:-1] in (self.mask.shape, (self.mask.numel(),)):
            self.kept = self.mask.reshape(-1)
            self.rows = self.rows[self.kept]
        if len(self.rows):
            self.low, self.high = self.rows.amin(dim=0).float(), self.rows.amax(dim=0).float()
        self.key, self.held, self.copied = key, x, None

    def copy(self) -> Tensor:
        """Return the rows for later, when x may have been changed in place."""
        if self.copied is None:
            self.copied = self.rows.clone() if self.kept is None else self.rows
        return self.copied


class _Reservoir:
    """The `size` rows of greatest priority of all that were seen, in any number of columns."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.threshold = 0.0
        """The greatest priority of a row that is not kept."""
        self._priority = torch.empty(0)
        self._columns: tuple[Tensor, ...] = ()

    def add(self, priority: Tensor, *columns: Tensor) -> None:
        """Take in rows, [rows] or [rows, features] each."""
        count = len(self._priority)
        ordered, order = torch.cat([self._priority, priority]).sort(descending=True)
        if len(order) > self.size:
            self.threshold = max(self.threshold, float(ordered[self.size]))
        kept = order[: self.size]
        is_old = kept < count
        old, new = kept[is_old], kept[~is_old] - count
        before = self._columns or tuple(column[:0] for column in columns)
        self._columns = tuple(
            torch.cat([a[old], b[new]]) for a, b in zip(before, columns, strict=True)
        )
        self._priority = torch.cat([self._priority[old], priority[new]])

    def column(self, index: int, otherwise: Tensor) -> Tensor:
        """Return a column; `otherwise`, if nothing was ever added."""
        return self._columns[index] if self._columns else otherwise


class _Seen:
    """What was seen of one linear: the range of its input channels, and samples of its rows."""

    def __init__(self, name: str, linear: nn.Linear, rows: int, gradient_rows: int) -> None:
        self.name = name
        self.linear = linear
        self.rows = 0
        self.sample = _Reservoir(rows)
        self.costly = _Reservoir(gradient_rows)
        self.differentiated = False
        # The same seed for all: linears that share an input keep the same rows.
        self.generator = torch.Generator().manual_seed(0)
        # Another one each: what chance adds to the loss of one linear evens out over all.
        self.gradient_generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.low = torch.full((FOLDS, linear.in_features), torch.inf)
        self.high = torch.full((FOLDS, linear.in_features), -torch.inf)

    def add(self, x: Tensor, recent: _Recent) -> None:
        recent.look(x)
        self.rows += len(recent.rows)
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
        self.sample.add(chance, recent.rows, _all_of(fold, recent.rows))

    def gradient_taker(self, recent: _Recent) -> Callable[[Tensor], None]:
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
            self.costly.add(size / chance, rows, of_rows, size, _all_of(fold, rows))

        return take

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rows, gradients, how many rows each stands for, and folds."""
        none = self.linear.weight.detach()[:0]
        size = self.costly.column(2, torch.empty(0))
        return (
            self.costly.column(0, none),
            self.costly.column(1, none.new_empty(0, self.linear.out_features)),
            # 0 / 0 is of rows that cost nothing, when all that do are kept.
            (self.costly.threshold / size).nan_to_num(1.0).clamp_min(1.0),
            self.costly.column(3, _all_of(0, none)),
        )


def _all_of(fold: int, rows: Tensor) -> Tensor:
    return torch.full((len(rows),), fold, dtype=torch.uint8)


class InputRanges:
    """Gathers a `Calibration` of linears, batch by batch, from whatever runs them."""

    def __init__(self, linears: Mapping[str, nn.Linear], rows: int, gradient_rows: int = 0) -> None:
        self._linears = linears
        self._ranges = {
            name: _Seen(name, linear, rows, gradient_rows) for name, linear in linears.items()
        }
        self._keep_rows = bool(rows)
        self._recent = _Recent()
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
        sampled = reached if self._keep_rows else {}
        costly = {n: seen.gradients() for n, seen in reached.items() if seen.differentiated}
        return Calibration(
            channel_min={name: seen.low.amin(dim=0) for name, seen in reached.items()},
            channel_max={name: seen.high.amax(dim=0) for name, seen in reached.items()},
            rows={name: seen.sample.column(0, torch.empty(0)) for name, seen in sampled.items()},
            fingerprints={name: fingerprint(self._linears[name]) for name in reached},
            tokens=max((seen.rows for seen in reached.values()), default=0),
            batches=self._batches,
            unreached=tuple(name for name in self._ranges if name not in reached),
            example=example,
            row_folds={
                name: seen.sample.column(1, torch.empty(0)) for name, seen in sampled.items()
            },
            gradient_rows={name: of_name[0] for name, of_name in costly.items()},
            gradients={name: of_name[1] for name, of_name in costly.items()},
            gradient_weights={name: of_name[2] for name, of_name in costly.items()},
            gradient_folds={name: of_name[3] for name, of_name in costly.items()},
            fold_min={name: seen.low for name, seen in reached.items()},
            fold_max={name: seen.high for name, seen in reached.items()},
        )


@contextmanager
def watching_inputs(
    modules: Mapping[str, nn.Module], argument: str, see: Callable[[str, Any], None]
) -> Iterator[None]:
    """Call see(name, input) before every call of a module; `argument` names its input."""

    def hook(name: str) -> Any:
        return lambda _module, args, kwargs: see(name, args[0] if args else kwargs[argument])

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
