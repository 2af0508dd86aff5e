"""One pass over sample text: the range of every input channel of every linear.

The ranges serve every later choice: a smoothing plan divides channel j by s_j > 0, so the range
after smoothing is the range here / s, exactly, and no second pass is needed.
"""

from __future__ import annotations

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
TUNING_ROWS = 256
"""Sampled rows a linear that suffice for `tune`."""

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    ignore: tuple[str, ...] = ("lm_head",),
    rows: int = SAMPLED_ROWS,
    gradients: bool = False,
    progress: bool | None = None,
) -> Calibration:
    """Run `model` over `batches` and record the input range of every linear not ignored.

    Beside the range, a uniform sample of at most `rows` input rows is kept of each linear, and a
    quarter as many of those with the greatest values, for `tune`; they take 5/4 rows * in_features
    elements a linear. With `gradients` each batch is also run
    backward, and for every sampled row the gradient of the model's loss with respect to the
    linear's output is kept: it tells `tune` which errors matter. That takes 5/4 rows *
    out_features elements more a linear, three times the time, and the memory of one batch's graph.

    A batch is a tensor (the model's one positional argument), a tuple or list (positional
    arguments) or a mapping (keyword arguments). Positions that a mapping's two-dimensional
    `attention_mask` masks with 0 are padding and are not counted. The model runs in evaluation mode
    without gradients and is left as it was. `progress=None` shows a bar when stderr is a terminal.

    Raises `SqCpuError` when there is no batch, or a batch is empty, of another type or longer than
    the model's context, when an activation is NaN or infinite, when the model has no linear, and
    for an entry of `ignore` that matches none.
    """
    with linearized(model):
        return _calibrate(model, batches, ignore, rows, gradients, progress)


def _calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    ignore: tuple[str, ...],
    rows: int,
    gradients: bool,
    progress: bool | None,
) -> Calibration:
    check_ignore(model, ignore)
    linears = quantizable_linears(model, ignore)
    if not linears:
        raise SqCpuError(f"nothing to calibrate: no Linear in the model beside {ignore}")
    ranges = InputRanges(linears, rows)
    example: Example | None = None
    labels = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(ranges.watching())
        if gradients:
            stack.enter_context(differentiating(model, linears, ranges.see_gradients))
        for args, kwargs in model_inputs(model, batches, "calibration", "calibrating", progress):
            example = example or example_of(args, kwargs)
            mask = kwargs.get("attention_mask")
            with ranges.batch(mask):
                outputs = model(*args, **kwargs)
                if gradients:
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
    low: Tensor
    high: Tensor

    def begin(self, batch: int, mask: Any) -> None:
        self.batch = batch
        padded = isinstance(mask, Tensor) and mask.dim() == 2 and not mask.all()
        self.mask = mask.bool() if padded else None

    def forget(self) -> None:
        self.key = self.held = None
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
        self.key, self.held = key, x


class _Reservoir:
    """The rows of greatest priority of all that were seen, with their gradients."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.seen = 0
        self.priority = torch.empty(0)
        self.ids = torch.empty(0, dtype=torch.int64)
        self.rows = torch.empty(0)
        self.folds = torch.empty(0, dtype=torch.uint8)
        self.gradients: Tensor | None = None

    def add(self, x: Tensor, priority: Tensor, fold: int) -> None:
        """Take in rows; they are numbered in the order of coming."""
        count = len(self.priority)
        size = min(self.size, count + len(x))
        priority, kept = torch.cat([self.priority, priority]).topk(size)
        is_old = kept < count
        old, new = kept[is_old], kept[~is_old] - count
        taken = x[new].detach()
        self.rows = torch.cat([self.rows[old], taken]) if is_old.any() else taken
        self.folds = torch.cat([self.folds[old], torch.full_like(new, fold, dtype=torch.uint8)])
        self.ids = torch.cat([self.ids[old], new + self.seen])
        if self.gradients is not None:
            none_yet = self.gradients.new_zeros(len(new), self.gradients.shape[1])
            self.gradients = torch.cat([self.gradients[old], none_yet])
        self.priority = torch.cat([priority[is_old], priority[~is_old]])
        self.seen += len(x)

    def add_gradients(self, first: int, gradients: Tensor) -> None:
        """Take in the gradients [rows, out_features] of the rows from number `first` on."""
        if self.gradients is None:
            self.gradients = gradients.new_zeros(len(self.ids), gradients.shape[1])
        mine = (self.ids >= first) & (self.ids < first + len(gradients))
        self.gradients[mine] = gradients[self.ids[mine] - first]


class _ChannelRange:
    """Running minimum and maximum of one linear's input channels, and samples of rows."""

    def __init__(self, name: str, linear: nn.Linear, rows: int) -> None:
        self.name = name
        self.linear = linear
        self.sample = _Reservoir(rows)
        self.peaks = _Reservoir(rows // 4)
        # The same seed for all: linears that share an input keep the same rows.
        self.generator = torch.Generator().manual_seed(0)
        self.low = torch.full((FOLDS, linear.in_features), torch.inf)
        self.high = torch.full((FOLDS, linear.in_features), -torch.inf)
        self.added = range(0)

    @property
    def rows(self) -> int:
        """How many rows were seen."""
        return self.sample.seen

    def add(self, x: Tensor, recent: _Recent) -> None:
        recent.look(x)
        self.added = range(self.rows, self.rows + len(recent.rows))
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
        self.sample.add(recent.rows, chance, fold)
        self.peaks.add(recent.rows, recent.rows.abs().amax(dim=1).float(), fold)

    def gradient_taker(self, kept: Tensor | None) -> Callable[[Tensor], None]:
        """Return what takes the gradient of the output whose input was added last."""
        added = self.added

        def take(gradient: Tensor) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1])
            rows = rows if kept is None else rows[kept]
            for reservoir in (self.sample, self.peaks):
                reservoir.add_gradients(added.start, rows)

        return take

    def gradients(self) -> Tensor:
        """Return those of the sample, then of the peaks; 0 where the loss does not depend on it."""
        none = self.linear.weight.new_zeros(0, self.linear.out_features)
        parts = [
            none.new_zeros(len(reservoir.ids), none.shape[1])
            if reservoir.gradients is None
            else reservoir.gradients
            for reservoir in (self.sample, self.peaks)
        ]
        return torch.cat(parts).detach()

    def weights(self) -> Tensor:
        """Return how many of all rows each of the sample, then of the peaks, stands for."""
        is_peak = torch.isin(self.sample.ids, self.peaks.ids)
        others = self.rows - len(self.peaks.ids)
        share = others / max(1, int((~is_peak).sum()))
        return torch.cat([(~is_peak).float() * share, torch.ones(len(self.peaks.ids))])


class InputRanges:
    """Gathers a `Calibration` of linears, batch by batch, from whatever runs them."""

    def __init__(self, linears: Mapping[str, nn.Linear], rows: int) -> None:
        self._linears = linears
        self._ranges = {name: _ChannelRange(name, linear, rows) for name, linear in linears.items()}
        self._keep_rows = bool(rows)
        self._with_gradients = False
        self._recent = _Recent()
        self._batches = 0

    def _see(self, name: str, x: Tensor) -> None:
        self._ranges[name].add(x, self._recent)

    def watching(self) -> AbstractContextManager[None]:
        """Return a context in which the inputs of the linears are seen."""
        return watching_inputs(self._linears, "input", self._see)

    def see_gradients(self, name: str) -> Callable[[Tensor], None]:
        """Return what takes the gradient of a linear's output, right after the linear ran."""
        self._with_gradients = True
        return self._ranges[name].gradient_taker(self._recent.kept)

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
        return Calibration(
            channel_min={name: seen.low.amin(dim=0) for name, seen in reached.items()},
            channel_max={name: seen.high.amax(dim=0) for name, seen in reached.items()},
            rows={name: seen.sample.rows for name, seen in sampled.items()},
            fingerprints={name: fingerprint(self._linears[name]) for name in reached},
            tokens=max((seen.rows for seen in reached.values()), default=0),
            batches=self._batches,
            unreached=tuple(name for name in self._ranges if name not in reached),
            example=example,
            peaks={name: seen.peaks.rows for name, seen in sampled.items()},
            gradients={name: seen.gradients() for name, seen in sampled.items()}
            if self._with_gradients
            else {},
            row_weights={name: seen.weights() for name, seen in sampled.items()},
            row_folds={
                name: torch.cat([seen.sample.folds, seen.peaks.folds])
                for name, seen in sampled.items()
            },
            fold_min={name: seen.low for name, seen in sampled.items()},
            fold_max={name: seen.high for name, seen in sampled.items()},
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
