"""One pass over sample text: the range of every input channel of every linear.

The ranges serve every later choice: a smoothing plan divides channel j by s_j > 0, so the range
after smoothing is the range here / s, exactly, and no second pass is needed.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sq_cpu.errors import SqCpuError
from sq_cpu.files import replacing
from sq_cpu.linears import check_ignore, linearized, quantizable_linears
from sq_cpu.progress import track

__all__ = [
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

_FORMAT = "sq_cpu.calibration"
_VERSION = 2
_EXAMPLE_TOKENS = 32
SAMPLED_ROWS = 64
_PLAIN = (bool, int, float, str, type(None))

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the linears' inputs look like, by the linears' full names."""

    channel_min: dict[str, Tensor]
    channel_max: dict[str, Tensor]
    """Range of every input channel, fp32 [in_features] each."""
    rows: dict[str, Tensor]
    """A uniform sample of input rows, of the model's dtype [at most `rows`, in_features] each."""
    fingerprints: dict[str, int]
    """Checksum of some of each linear's weight rows, to tell when it has changed since."""
    tokens: int
    """Rows that the busiest linear saw, padding not counted."""
    batches: int
    unreached: tuple[str, ...] = field(default=())
    """Linears that no batch reached; they have no ranges."""
    example: Example | None = None
    """The first batch, if it is token ids alone their first 32: what folds are proven with."""

    def absmax(self, name: str) -> Tensor:
        """Return max|X_j| of a linear's input, fp32 [in_features]."""
        low, high = self.channels(name)
        return torch.maximum(low.abs(), high.abs())

    def channels(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest value of each input channel of a linear."""
        if name in self.unreached:
            raise SqCpuError(
                f"no calibration batch reached {name}: calibrate on text that does, or ignore it"
            )
        if name not in self.channel_min:
            raise SqCpuError(
                f"the calibration does not cover {name}: calibrate this very model, "
                "ignoring no more than the scheme does"
            )
        return self.channel_min[name], self.channel_max[name]

    def check_weight(self, name: str, linear: nn.Module) -> None:
        """Raise `SqCpuError` unless a linear's weight is still what it was when calibrated.

        Ranges hold for one set of weights: folding changes both.
        """
        self.channels(name)
        if self.fingerprints.get(name) != _fingerprint(linear):
            raise SqCpuError(
                f"the weights of {name} changed since the calibration: calibrate again"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file; it appears whole or not at all."""
        tensors = {f"channel_min.{name}": value for name, value in self.channel_min.items()}
        tensors |= {f"channel_max.{name}": value for name, value in self.channel_max.items()}
        tensors |= {f"rows.{name}": value for name, value in self.rows.items()}
        given, plain = _split_example(self.example)
        tensors |= {f"example.{key}": value for key, value in given.items()}
        header = {
            "format": _FORMAT,
            "format_version": _VERSION,
            "tokens": self.tokens,
            "batches": self.batches,
            "unreached": list(self.unreached),
            "fingerprints": self.fingerprints,
            "example": plain,
        }
        with replacing(path) as temporary:
            temporary.write_bytes(safetensors_bytes(tensors, {_FORMAT: json.dumps(header)}))
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote; `SqCpuError` on anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_FORMAT, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise SqCpuError(f"cannot read the calibration {path}: {error}") from error
        if header is None:
            raise SqCpuError(f"{path} is not a calibration that sq_cpu saved")
        low, high, rows, given = (
            {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
            for kind in ("channel_min.", "channel_max.", "rows.", "example.")
        )
        try:
            if header["format_version"] > _VERSION:
                raise SqCpuError(
                    f"{path} has calibration format {header['format_version']}, newer than this "
                    f"sq_cpu reads ({_VERSION}): upgrade sq_cpu"
                )
            tokens, batches = int(header["tokens"]), int(header["batches"])
            unreached, fingerprints = tuple(header["unreached"]), dict(header["fingerprints"])
            example = _join_example(given, header.get("example"))
        except (KeyError, TypeError) as error:
            raise SqCpuError(
                f"the header of {path} is not one that sq_cpu writes: calibrate again"
            ) from error
        return cls(low, high, rows, fingerprints, tokens, batches, unreached, example)


def _split_example(example: Example | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return an example's tensors and the rest by position or keyword; None: JSON cannot say it."""
    args, kwargs = example or ((), {})
    values = {str(index): value for index, value in enumerate(args)} | kwargs
    given = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in values.items() if key not in given}
    if example is None or not all(isinstance(value, _PLAIN) for value in plain.values()):
        return {}, None
    return {key: value.contiguous() for key, value in given.items()}, plain


def _join_example(given: dict[str, Tensor], plain: dict[str, Any] | None) -> Example | None:
    """Put together what `Calibration.save` took apart; None of a file without an example."""
    if plain is None:
        return None
    values = given | plain
    positions = sorted(int(key) for key in values if key.isdigit())
    args = tuple(values[str(index)] for index in positions)
    return args, {key: value for key, value in values.items() if not key.isdigit()}


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    ignore: tuple[str, ...] = ("lm_head",),
    rows: int = SAMPLED_ROWS,
    progress: bool | None = None,
) -> Calibration:
    """Run `model` over `batches` and record the input range of every linear not ignored.

    Beside the range, a uniform sample of at most `rows` input rows is kept of each linear, for
    `tune`; they take rows * in_features elements a linear.

    A batch is a tensor (the model's one positional argument), a tuple or list (positional
    arguments) or a mapping (keyword arguments). Positions that a mapping's two-dimensional
    `attention_mask` masks with 0 are padding and are not counted. The model runs in evaluation mode
    without gradients and is left as it was. `progress=None` shows a bar when stderr is a terminal.

    Raises `SqCpuError` when there is no batch, or a batch is empty, of another type or longer than
    the model's context, when an activation is NaN or infinite, when the model has no linear, and
    for an entry of `ignore` that matches none.
    """
    with linearized(model):
        return _calibrate(model, batches, ignore, rows, progress)


def _calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    ignore: tuple[str, ...],
    rows: int,
    progress: bool | None,
) -> Calibration:
    check_ignore(model, ignore)
    linears = quantizable_linears(model, ignore)
    if not linears:
        raise SqCpuError(f"nothing to calibrate: no Linear in the model beside {ignore}")
    ranges = InputRanges(linears, rows)
    example: Example | None = None
    with evaluating(model), ranges.watching():
        for args, kwargs in model_inputs(model, batches, "calibration", "calibrating", progress):
            example = example or example_of(args, kwargs)
            with ranges.batch(kwargs.get("attention_mask")):
                model(*args, **kwargs)
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


def _fingerprint(linear: nn.Module) -> int:
    """Return the CRC-32 of the bytes of at most 8 evenly spaced rows of a linear's weight."""
    weight = linear.get_parameter("weight").detach()
    rows = torch.linspace(0, len(weight) - 1, min(8, len(weight))).long()
    return zlib.crc32(weight[rows].contiguous().view(torch.uint8).numpy().tobytes())


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
        if self.mask is not None and x.shape[:-1] in (self.mask.shape, (self.mask.numel(),)):
            self.rows = self.rows[self.mask.reshape(-1)]
        if len(self.rows):
            self.low, self.high = self.rows.amin(dim=0).float(), self.rows.amax(dim=0).float()
        self.key, self.held = key, x


class _Sample:
    """A uniform sample of rows, seen once: those with the greatest of random keys."""

    def __init__(self, size: int) -> None:
        self.size = size
        # The same seed for all: linears that share an input keep the same rows.
        self.generator = torch.Generator().manual_seed(0)
        self.keys = torch.empty(0)
        self.rows = torch.empty(0)

    def add(self, x: Tensor) -> None:
        new = torch.rand(len(x), generator=self.generator)
        keys, kept = torch.cat([self.keys, new]).topk(min(self.size, len(self.keys) + len(new)))
        is_old = kept < len(self.keys)
        added = x[kept[~is_old] - len(self.keys)].detach()
        self.rows = torch.cat([self.rows[kept[is_old]], added]) if is_old.any() else added
        self.keys = torch.cat([keys[is_old], keys[~is_old]])


class _ChannelRange:
    """Running minimum and maximum of one linear's input channels, fp32, and a sample of rows."""

    def __init__(self, name: str, linear: nn.Linear, rows: int) -> None:
        self.name = name
        self.sample = _Sample(rows)
        self.rows = 0
        self.low = torch.full((linear.in_features,), torch.inf)
        self.high = torch.full((linear.in_features,), -torch.inf)

    def add(self, x: Tensor, recent: _Recent) -> None:
        recent.look(x)
        if not len(recent.rows):  # an expert that no token was routed to, or all padding
            return
        if not (recent.low.isfinite().all() and recent.high.isfinite().all()):
            raise SqCpuError(
                f"calibration batch {recent.batch}: NaN or Inf in the input of {self.name}; "
                "check the batch and the model's weights"
            )
        torch.minimum(self.low, recent.low, out=self.low)
        torch.maximum(self.high, recent.high, out=self.high)
        self.rows += len(recent.rows)
        self.sample.add(recent.rows)


class InputRanges:
    """Gathers a `Calibration` of linears, batch by batch, from whatever runs them."""

    def __init__(self, linears: Mapping[str, nn.Linear], rows: int) -> None:
        self._linears = linears
        self._ranges = {name: _ChannelRange(name, linear, rows) for name, linear in linears.items()}
        self._keep_rows = bool(rows)
        self._recent = _Recent()
        self._batches = 0

    def _see(self, name: str, x: Tensor) -> None:
        self._ranges[name].add(x, self._recent)

    def watching(self) -> AbstractContextManager[None]:
        """Return a context in which the inputs of the linears are seen."""
        return watching_inputs(self._linears, "input", self._see)

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
        return Calibration(
            channel_min={name: seen.low for name, seen in reached.items()},
            channel_max={name: seen.high for name, seen in reached.items()},
            rows={name: seen.sample.rows for name, seen in reached.items() if self._keep_rows},
            fingerprints={name: _fingerprint(self._linears[name]) for name in reached},
            tokens=max((seen.rows for seen in reached.values()), default=0),
            batches=self._batches,
            unreached=tuple(name for name in self._ranges if name not in reached),
            example=example,
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
