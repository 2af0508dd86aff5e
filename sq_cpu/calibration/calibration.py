"""What a calibration pass saw: `Calibration`, a value that can be saved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from sq_cpu.calibration.lengths import checked_lengths, no_batch, target_bucket
from sq_cpu.calibration.stored import FOLDS, check_tensors
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.files import as_path, write_file
from sq_cpu.models.calls import Example
from sq_cpu.models.unchanged import checksum
from sq_cpu.parsing import parsed_json, typed

__all__ = ["FOLDS", "TENSORS", "Calibration", "check_is_calibration", "fingerprint"]

_FORMAT = "sq_cpu.calibration"
_VERSION = 8
TENSORS = (
    "channel_min",
    "channel_max",
    "rows",
    "row_folds",
    "row_places",
    "peaks",
    "peak_folds",
    "gradient_rows",
    "gradients",
    "gradient_weights",
    "gradient_folds",
    "gradient_places",
    "fold_min",
    "fold_max",
)
_TABLES = (*TENSORS, "fingerprints", "rows_seen", "in_float")
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the linears' inputs look like, by the linears' full names."""

    channel_min: dict[str, Tensor]
    channel_max: dict[str, Tensor]
    """Range of every input channel, fp32 [in_features] each."""
    rows: dict[str, Tensor]
    """A uniform sample of input rows, of the model's dtype [at most `rows`, in_features] each."""
    fingerprints: dict[str, int]
    """Checksum of some of each linear's weight rows, which tells whether it changed since."""
    tokens: int
    """Rows that the busiest linear saw, padding not counted."""
    batches: int
    unreached: tuple[str, ...] = field(default=())
    """Linears that no batch reached; they have no ranges."""
    in_float: dict[str, str] = field(default_factory=dict)
    """Linears that the model's own code reads or changes the weight of, and how. They have no
    ranges and stay in float."""
    example: Example | None = None
    """With what folds are proven: the first batch that is not all padding, or one row of it."""
    row_folds: dict[str, Tensor] = field(default_factory=dict)
    """The fold of each of `rows`, uint8: its batch's number modulo `FOLDS`."""
    row_places: dict[str, Tensor] = field(default_factory=dict)
    """The number of each of `rows` among all that the linear saw, int64."""
    peaks: dict[str, Tensor] = field(default_factory=dict)
    """The rows of each fold that reach farthest where blocks of 64 channels are rotated, like
    `rows`: their ends are the calibrated range of such a linear, as ranges of single channels do
    not tell what they add up to. Files up to version 5 have none."""
    peak_folds: dict[str, Tensor] = field(default_factory=dict)
    """The fold of each of `peaks`, uint8."""
    rows_seen: dict[str, int] = field(default_factory=dict)
    """Rows that each linear saw, without padding where that can be told."""
    gradient_rows: dict[str, Tensor] = field(default_factory=dict)
    """Input rows with known gradients, like `rows` but not uniformly drawn."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """The gradients of the model's sampled loss (see `sampled_loss`) with respect to each linear's
    output, [gradient_rows, out_features]: one for each of `gradient_rows`. Empty unless asked for.
    Linears that the model runs without gradients have none."""
    gradient_weights: dict[str, Tensor] = field(default_factory=dict)
    """How many of all rows each of `gradient_rows` stands for, fp32."""
    gradient_folds: dict[str, Tensor] = field(default_factory=dict)
    """The fold of each of `gradient_rows`, uint8."""
    gradient_places: dict[str, Tensor] = field(default_factory=dict)
    """The number of each of `gradient_rows` among all that the linear saw, int64."""
    fold_min: dict[str, Tensor] = field(default_factory=dict)
    fold_max: dict[str, Tensor] = field(default_factory=dict)
    """Range of every input channel in each fold, fp32 [FOLDS, in_features]; min > max: no rows."""
    other_rows: dict[str, Tensor] = field(default_factory=dict)
    """Of a part that is held out, the rows of the other folds, like `rows`; never saved."""
    prefix: tuple[int, ...] = ()
    """The first tokens of texts, which were not counted: a `Prefix` stands for them."""
    head: Calibration | None = None
    """The same of the model's head alone, where `ignore` keeps it out of the rest; None: it does
    not, or there is none."""
    lengths: tuple[int, ...] = ()
    """The lengths in tokens that `by_length` may have, ascending."""
    by_length: dict[int, Calibration] = field(default_factory=dict)
    """What the batches of each length alone gave, without gradients; see `for_length`. Lengths that
    no batch had are missing."""

    def for_length(self, tokens: int) -> Calibration:
        """Return the calibration of the batches of the least length that holds so many tokens.

        It is the one that `calibrate` makes of these batches alone. Plans that are made or tuned
        for texts of that length begin with it, too.

        Raises `SqCpuError` for a calibration without lengths, more tokens than any has, and a
        length that no batch had.
        """
        bucket = target_bucket(tokens, self.lengths)
        if bucket not in self.by_length:
            raise SqCpuError(no_batch(tokens, bucket, self.lengths))
        return self.by_length[bucket]

    def with_head(self) -> Calibration:
        """Return this calibration with the head as one of its linears."""
        if self.head is None:
            return self
        tables = {table: getattr(self, table) | getattr(self.head, table) for table in _TABLES}
        unreached = self.unreached + self.head.unreached
        return replace(self, unreached=unreached, head=None, **tables)

    def with_head_apart(self, name: str) -> Calibration:
        """Return this calibration with one of its linears as `head`: undo `with_head`."""

        def part(*, head: bool) -> Calibration:
            tables: dict[str, Any] = {
                table: {n: v for n, v in getattr(self, table).items() if (n == name) == head}
                for table in _TABLES
            }
            unreached = tuple(n for n in self.unreached if (n == name) == head)
            return replace(self, unreached=unreached, **tables)

        return replace(part(head=False), head=part(head=True))

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
        if name in self.in_float:
            raise SqCpuError(f"{name} has to stay in float: {self.in_float[name]}")
        if name not in self.channel_min:
            raise SqCpuError(
                f"the calibration does not cover {name}: calibrate this very model, "
                "ignoring no more than the scheme does"
            )
        return self.channel_min[name], self.channel_max[name]

    def farthest(self, name: str) -> Tensor | None:
        """Return the rows whose ends are a rotated input's range: `peaks`, and `rows` with them.

        Not the rows of a part that is held out: its scores are on them. None without `peaks`.
        """
        peaks = self.peaks.get(name)
        if peaks is None or not len(peaks) or name not in self.row_folds:
            return peaks
        return torch.cat([peaks, self.rows[name]])

    def typical(self, name: str) -> Tensor | None:
        """Return the uniform sample that a static range is found on, of a part those held in."""
        return self.other_rows.get(name, self.rows.get(name))

    def check_weight(self, name: str, linear: nn.Module) -> None:
        """Raise `SqCpuError` unless a linear's weight is still what it was when calibrated.

        Ranges hold for one set of weights: folding changes both.
        """
        low, _ = self.channels(name)
        shapes = linear.get_parameter("weight").shape
        given = (len(low), self.gradients[name].shape[1] if name in self.gradients else shapes[0])
        if given != (shapes[1], shapes[0]):
            raise SqCpuError(
                f"the calibration is of another {name}, with {given[0]} inputs and {given[1]} "
                "outputs: calibrate this very model"
            )
        if self.fingerprints.get(name) != fingerprint(linear):
            raise SqCpuError(
                f"the weights of {name} changed since the calibration: calibrate again"
            )

    def held_out(self, names: Iterable[str]) -> tuple[Calibration, ...]:
        """Return for each fold these linears' rows, with the ranges that the other folds saw.

        A choice that is made by these ranges is then scored on rows that it has not seen, as in
        use. A calibration of one batch, or from a file without folds, is returned as it is.
        """
        names = [name for name in names if name in self.fold_min]
        folds = (self._of_fold(fold, names) for fold in range(FOLDS))
        return tuple(held for held in folds if held is not None) or (self,)

    def _of_fold(self, fold: int, names: Iterable[str]) -> Calibration | None:
        others = [other for other in range(FOLDS) if other != fold]
        low = {name: self.fold_min[name][others].amin(dim=0) for name in names}
        high = {name: self.fold_max[name][others].amax(dim=0) for name in names}
        reached = [
            name
            for name in names
            if (low[name] <= high[name]).all()
            and (self.fold_min[name][fold] <= self.fold_max[name][fold]).all()
            and self._has_rows(name, fold)
        ]
        if not reached:
            return None

        def part(kind: dict[str, Tensor], folds: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: kind[name][folds[name] == fold] for name in reached if name in kind}

        peaks = {n: self.peaks[n][self.peak_folds[n] != fold] for n in reached if n in self.peaks}
        rest = {n: self.rows[n][self.row_folds[n] != fold] for n in reached if n in self.rows}

        return replace(
            self,
            channel_min={name: low[name] for name in reached},
            channel_max={name: high[name] for name in reached},
            rows=part(self.rows, self.row_folds),
            other_rows=rest,
            row_folds={},
            row_places={},
            peaks=peaks,
            peak_folds={},
            gradient_rows=part(self.gradient_rows, self.gradient_folds),
            gradients=part(self.gradients, self.gradient_folds),
            gradient_weights=part(self.gradient_weights, self.gradient_folds),
            gradient_folds={},
            gradient_places={},
            fold_min={},
            fold_max={},
        )

    def _has_rows(self, name: str, fold: int) -> bool:
        folds = [kind[name] for kind in (self.row_folds, self.gradient_folds) if name in kind]
        return not folds or any(bool((of_rows == fold).any()) for of_rows in folds)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file; it appears whole or not at all."""
        tensors, header = self._stored()
        header |= {"format": _FORMAT, "format_version": _VERSION, "lengths": list(self.lengths)}
        header["by_length"] = {}
        for length, part in self.by_length.items():
            of_part, header["by_length"][str(length)] = part._stored()
            tensors |= {f"{length}.{key}": tensor for key, tensor in of_part.items()}
        write_file(path, safetensors_bytes(tensors, {_FORMAT: json.dumps(header)}))
        return Path(path)

    def _stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and the header of all but what is by length."""
        whole = self.with_head()
        tensors = {
            f"{kind}.{name}": value.contiguous()
            for kind in TENSORS
            for name, value in getattr(whole, kind).items()
        }
        given, plain = _split_example(self.example)
        tensors |= {f"example.{key}": value for key, value in given.items()}
        header = {
            "tokens": self.tokens,
            "batches": self.batches,
            "unreached": list(whole.unreached),
            "in_float": whole.in_float,
            "fingerprints": whole.fingerprints,
            "rows_seen": whole.rows_seen,
            "example": plain,
            "prefix": list(self.prefix),
        }
        if self.head is not None:
            header["head"] = next(
                iter((*self.head.rows_seen, *self.head.unreached, *self.head.in_float))
            )
        return tensors, header

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote; `SqCpuError` on anything else."""
        path = as_path(path)
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_FORMAT, "null")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise SqCpuError(f"cannot read the calibration {path}: {error}") from error
        header = parsed_json(text, f"the header of {path}")
        if not isinstance(header, dict):
            raise SqCpuError(f"{path} is not a calibration that sq_cpu saved")
        by_length: dict[str, dict[str, Tensor]] = {}
        for key in [key for key in tensors if key[:1].isdecimal()]:
            length, _, rest = key.partition(".")
            by_length.setdefault(length, {})[rest] = tensors.pop(key)
        version = header.get("format_version")
        if isinstance(version, int) and version > _VERSION:
            raise SqCpuError(
                f"{path} has calibration format {version}, newer than this sq_cpu reads "
                f"({_VERSION}): upgrade sq_cpu"
            )
        try:
            typed(int, version, "format_version")
            whole = cls._read(tensors, header)
            lengths = checked_lengths(typed(tuple[int, ...], header.get("lengths", []), "lengths"))
            headers = typed(dict[str, Any], header.get("by_length", {}), "by_length")
            if by_length.keys() - headers or not headers.keys() <= set(map(str, lengths)):
                raise SqCpuError("lengths and by_length differ")
            parts = {
                int(length): cls._read(by_length.get(length, {}), typed(dict[str, Any], of, length))
                for length, of in headers.items()
            }
        except (KeyError, SqCpuError) as error:
            raise SqCpuError(
                f"{path} is not one that sq_cpu writes ({first_line(error)}): calibrate again"
            ) from error
        return replace(whole, lengths=lengths, by_length=parts)

    @classmethod
    def _read(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Calibration:
        """Undo `_stored`; `KeyError` or `SqCpuError` for what it does not give."""
        kinds: dict[str, Any] = {kind: {} for kind in (*TENSORS, "example")}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            kinds.setdefault(kind, {})[name] = tensor
        tokens, batches = (typed(int, header[key], key) for key in ("tokens", "batches"))
        unreached = typed(tuple[str, ...], header["unreached"], "unreached")
        counts = dict[str, int]
        fingerprints = typed(counts, header["fingerprints"], "fingerprints")
        rows_seen = typed(counts, header.get("rows_seen", {}), "rows_seen")
        in_float = typed(dict[str, str], header.get("in_float", {}), "in_float")
        head = typed(str, header.get("head", ""), "head")
        known = (*kinds["channel_min"], *unreached, *in_float)
        if head and head not in known:
            raise SqCpuError(f"head is {head}, of which there is nothing")
        example = _join_example(kinds["example"], header.get("example"))
        prefix = typed(tuple[int, ...], header.get("prefix", []), "prefix")
        check_tensors(kinds)
        if kinds["channel_min"] and min(tokens, batches) < 1:
            raise SqCpuError("ranges of no batch")
        whole = cls(
            fingerprints=fingerprints,
            rows_seen=rows_seen,
            tokens=tokens,
            batches=batches,
            unreached=unreached,
            in_float=in_float,
            example=example,
            prefix=prefix,
            **{kind: kinds[kind] for kind in TENSORS},
        )
        return whole.with_head_apart(head) if head else whole


def check_is_calibration(calibration: object) -> None:
    """Raise `SqCpuError` for a path, batches or ranges in the place of a calibration."""
    if not isinstance(calibration, Calibration):
        raise SqCpuError(
            f"calibration is a {type(calibration).__name__}, not a Calibration: make one with "
            "calibrate(model, batches), or read a file with Calibration.load(path)"
        )


def _split_example(example: Example | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return an example's tensors, and the rest by position or keyword; None if JSON cannot."""
    args, kwargs = example or ((), {})
    values = {str(index): value for index, value in enumerate(args)} | kwargs
    given = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in values.items() if key not in given}
    if example is None or not all(isinstance(value, _PLAIN) for value in plain.values()):
        return {}, None
    return {key: value.contiguous() for key, value in given.items()}, plain


def _join_example(given: dict[str, Tensor], plain: Any) -> Example | None:
    """Join what `_split_example` split; None for a file without an example."""
    if plain is None:
        return None
    values = given | typed(dict[str, bool | int | float | str | None], plain, "example")
    args: list[Any] = []
    while (position := str(len(args))) in values:
        args.append(values.pop(position))
    return tuple(args), values


def fingerprint(linear: nn.Module) -> int:
    """Return the CRC-32 of the bytes of at most 8 evenly spaced rows of a linear's weight."""
    return checksum(linear.get_parameter("weight"))
