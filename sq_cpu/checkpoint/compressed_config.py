"""What the quantization_config of a compressed-tensors model says: read, or refused by name.

compressed-tensors is the format that llm-compressor writes and vLLM reads. Its config has groups of
linears, each with how weights and inputs are quantized:

    {"quant_method": "compressed-tensors", "format": "int-quantized",
     "quantization_status": "compressed", "ignore": ["lm_head"],
     "config_groups": {"group_0": {
         "targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel", ...},
         "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": true, ...}}}}

A target is a linear's full name, "re:" and a regular expression that its beginning matches, or the
name of a class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.parsing import check_fields, record
from sq_cpu.scheme import Activations

__all__ = ["COMPRESSED_TENSORS", "CompressedConfig", "CompressedGroup", "QuantArgs"]

COMPRESSED_TENSORS = "compressed-tensors"

_PLAIN, _PACKED = ("int-quantized", "naive-quantized"), "pack-quantized"
_READ = f"sq_cpu reads {', '.join(_PLAIN)} and {_PACKED}"
_OTHERWISE = "quantize the float model instead"
# (strategy, dynamic) of inputs; static ones are per tensor.
_ACTIVATIONS: dict[tuple[str, bool], Activations] = {
    ("tensor", False): "static",
    ("token", True): "per_token",
    ("tensor", True): "per_tensor",
}
_WEIGHTS = ("channel", "tensor", "group")
_BITS = (2, 4, 8)
# Of an expression: more repeats, and groups, could be tried for longer than anybody waits.
_MOST_REPEATS, _MOST_GROUPS = 3, 8
_REPEAT = re.compile(r"(?<![\\(])[*+?{]")
_FLAGS = re.compile(r"\(\?(?![:=!])")  # in verbose mode a blank may part a group from its repeat
_REPEATED_GROUP = re.compile(r"\)[*+?{]")


@dataclass(frozen=True, kw_only=True)
class QuantArgs:
    """How weights or inputs are quantized, by the names of compressed-tensors."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: str | None = None
    dynamic: bool | str = False
    actorder: str | bool | None = None
    block_structure: Any = None
    observer: Any = None
    observer_kwargs: Any = None
    scale_dtype: Any = None
    zp_dtype: Any = None

    def __post_init__(self) -> None:
        check_fields(self, "quantization arguments")
        if self.strategy is None:  # as compressed-tensors infers it
            size = self.group_size
            strategy = "tensor" if size is None else "group" if size > 0 else "channel"
            object.__setattr__(self, "strategy", strategy)


@dataclass(frozen=True, kw_only=True)
class CompressedGroup:
    """Linears that are quantized alike."""

    name: str
    targets: tuple[str, ...]
    packed: bool
    """Weights are packed into int32; if not, an int8 each."""
    bits: int
    """Of a weight."""
    symmetric_weights: bool
    strategy: str
    """Of the weights' scales: "channel", "tensor" or "group", of input channels."""
    group_size: int
    """Input channels that share a scale, of the strategy "group"; else 0."""
    activations: Activations | None
    """Of the inputs; None: they stay in float."""
    symmetric: bool
    """The inputs' range."""


@dataclass(frozen=True)
class CompressedConfig:
    """The groups of a model, and whose a linear is."""

    groups: tuple[CompressedGroup, ...]
    where: Path

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: Path) -> CompressedConfig:
        """Read a quantization_config, or raise `SqCpuError`, naming `where`, what, and the fix."""
        try:
            return cls(tuple(_groups(settings)), where)
        except SqCpuError as error:
            raise SqCpuError(f"{where}: {error}") from error

    @property
    def as_int8(self) -> bool:
        """Whether all weights are int8 rows, exactly, and all inputs quantized."""
        return all(
            group.activations is not None
            and group.strategy != "group"
            and (group.symmetric_weights or group.bits < 8)  # whose codes less their point fit
            for group in self.groups
        )

    def group_of(self, linear: str) -> CompressedGroup:
        """Return the group of a quantized linear, by its full name."""
        if len(self.groups) == 1:
            return self.groups[0]
        targets = {target: group for group in self.groups for target in group.targets}
        # As compressed-tensors ranks them: names, expressions, classes.
        if linear in targets:
            return targets[linear]
        for target in sorted(target for target in targets if target.startswith("re:")):
            if self._matches(target.removeprefix("re:"), linear):
                return targets[target]
        if "Linear" in targets:
            return targets["Linear"]
        raise SqCpuError(
            f"{self.where}: {linear} is quantized, but no config group has it as a target; "
            "copy the model again"
        )

    def _matches(self, pattern: str, name: str) -> bool:
        many = len(_REPEAT.findall(pattern)) > _MOST_REPEATS or pattern.count("(") > _MOST_GROUPS
        if many or _REPEATED_GROUP.search(pattern) or _FLAGS.search(pattern):
            raise SqCpuError(
                f"{self.where}: the target re:{pattern[:60]} repeats too much to be tried; name "
                "its layers instead"
            )
        try:
            return re.match(pattern, name) is not None
        except re.error as error:
            raise SqCpuError(
                f"{self.where}: the target re:{pattern[:60]} is no regular expression "
                f"({first_line(error)}); correct it"
            ) from error


def _groups(settings: Mapping[str, Any]) -> Iterator[CompressedGroup]:
    if settings.get("kv_cache_scheme") is not None:
        raise SqCpuError(
            "keys and values are quantized (kv_cache_scheme), which sq_cpu does not read: compress "
            "the model without; sq_cpu.fuse(model) has an int8 cache of its own"
        )
    sparsity = settings.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise SqCpuError(
            f"the weights are sparse (sparsity_config), which sq_cpu does not read: {_OTHERWISE}"
        )
    transforms = settings.get("transform_config") or {}
    if not isinstance(transforms, dict) or transforms.get("config_groups"):
        raise SqCpuError(
            "inputs are rotated (transform_config), which sq_cpu does not read: compress the model "
            "without"
        )
    # Not looked at: quantization_status, which early versions left at "frozen" beside integers.
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise SqCpuError("config_groups is no table of groups; copy the model again")
    for name, values in groups.items():
        try:
            yield _group(name, values, settings.get("format"))
        except SqCpuError as error:
            raise SqCpuError(f"config group {str(name)[:60]}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A config group as it is stored."""

    targets: list[str]
    weights: QuantArgs | None = None
    input_activations: QuantArgs | None = None
    output_activations: QuantArgs | None = None
    format: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "the group")


def _group(name: str, values: Any, usual_format: object) -> CompressedGroup:
    if isinstance(values, list):
        raise SqCpuError("it is the name of a preset; save the model again, which writes it out")
    stored: _Stored = record(_Stored, values, "the group")
    weights, inputs = stored.weights, stored.input_activations
    kind = stored.format or usual_format
    if kind not in (*_PLAIN, _PACKED):
        raise SqCpuError(f"its format is {str(kind)[:60]!r}; {_READ}: {_OTHERWISE}")
    if weights is None:
        raise SqCpuError(f"its weights are not quantized; {_READ}")
    if stored.output_activations is not None:
        raise SqCpuError(f"outputs are quantized, which sq_cpu does not read: {_OTHERWISE}")
    if weights.type != "int" or weights.num_bits not in _BITS:
        raise SqCpuError(
            f"weights of {weights.num_bits} bits of type {weights.type[:20]!r}; sq_cpu reads "
            f"integers of {', '.join(map(str, _BITS))} bits: {_OTHERWISE}"
        )
    strategy = str(weights.strategy)
    if strategy not in _WEIGHTS or weights.dynamic:
        raise SqCpuError(
            f"the strategy of its weights is {strategy[:60]!r}; sq_cpu reads "
            f"{', '.join(_WEIGHTS)}: {_OTHERWISE}"
        )
    size = weights.group_size or 0
    if strategy == "group" and size < 1:
        raise SqCpuError(f"group_size is {size}, not a positive number; copy the model again")
    if weights.actorder in ("group", "dynamic", True):
        raise SqCpuError(
            "columns are in groups by activation (actorder), which sq_cpu does not read: compress "
            "the model with actorder='weight'"
        )
    return CompressedGroup(
        name=str(name),
        targets=tuple(stored.targets),
        packed=kind == _PACKED,
        bits=weights.num_bits,
        symmetric_weights=weights.symmetric,
        strategy=strategy,
        group_size=size if strategy == "group" else 0,
        activations=None if inputs is None else _activations(inputs),
        symmetric=inputs is None or inputs.symmetric,
    )


def _activations(inputs: QuantArgs) -> Activations:
    found = _ACTIVATIONS.get((str(inputs.strategy), inputs.dynamic is True))
    if inputs.type != "int" or inputs.num_bits != 8:
        raise SqCpuError(
            f"inputs of {inputs.num_bits} bits of type {inputs.type[:20]!r}; sq_cpu reads integers "
            f"of 8 bits: {_OTHERWISE}"
        )
    if found is None or isinstance(inputs.dynamic, str):
        how = "dynamic" if inputs.dynamic else "static"
        raise SqCpuError(
            f"inputs are quantized by the {how} strategy {str(inputs.strategy)[:60]!r}; sq_cpu "
            f"reads static and dynamic 'tensor' and dynamic 'token': {_OTHERWISE}"
        )
    return found
