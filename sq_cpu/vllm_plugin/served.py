"""Which of our models vLLM can serve: what is known from a record, before vLLM builds anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sq_cpu.checkpoint.config import CONFIG, check_settings, record_of_settings
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.hadamard import BLOCK
from sq_cpu.kernels.torch_ops import LinearSettings
from sq_cpu.nn.entries import weight_columns
from sq_cpu.nn.quantizer import layer_settings
from sq_cpu.quantization.record import QuantizationRecord
from sq_cpu.scheme import Scheme

__all__ = ["LayerKind", "Linears", "check_model_type", "columns_here", "read_linears"]

_TRANSPOSED = ("gpt2",)
"""Models whose linears vLLM takes to be stored transposed."""
_ABSORBED = ("deepseek_v2", "deepseek_v3")
"""Models of whose linears vLLM takes the weight apart (multi-head latent attention)."""


@dataclass(frozen=True)
class LayerKind:
    """What is known of an int8 linear without its tensors."""

    scheme: Scheme
    smoothed: bool
    """Whether it divides its input by an s of its own."""
    hadamard: int

    @property
    def is_static(self) -> bool:
        """Whether it has an input scale of its own."""
        return self.scheme.activations == "static"

    def settings(self, static: tuple[float, int] | None) -> LinearSettings:
        """Return how the input is quantized, with the (scale, zero point) of a static scheme."""
        return layer_settings(self.scheme, static, self.hadamard)


@dataclass(frozen=True)
class Linears:
    """The int8 linears of a model, by the names that its modules have in vLLM."""

    kinds: Mapping[str, LayerKind]

    def of(self, names: Sequence[str]) -> LayerKind | None:
        """Return what linears are that vLLM lays side by side; None: in float.

        Raises `SqCpuError` where they are not alike, as vLLM quantizes their input once.
        """
        kinds = [self.kinds.get(name) for name in names]
        for name, kind in zip(names, kinds, strict=True):
            if _input_of(kind) != _input_of(kinds[0]):
                raise SqCpuError(
                    f"vLLM computes {', '.join(names)} as one linear, and {name} is not quantized "
                    f"as {names[0]} is; quantize with a plan that treats them alike"
                )
        return kinds[0]

    def below(self, prefix: str) -> str | None:
        """Return an int8 linear within a module, if there is one."""
        return next((name for name in self.kinds if name.startswith(f"{prefix}.")), None)

    def renamed(self, names: Mapping[str, str]) -> Linears:
        """Return these linears by other names, old -> new."""
        return Linears({names.get(name, name): kind for name, kind in self.kinds.items()})


def read_linears(settings: Mapping[str, Any]) -> Linears:
    """Return the int8 linears that a ``quantization_config`` of ours lists.

    Raises
    ------
    SqCpuError
        For what `sq_cpu.load` refuses, and what vLLM cannot compute.
    """
    path = Path(CONFIG)
    check_settings(settings, path)
    if settings["format_version"] < 5:
        raise SqCpuError(
            f"{path}: format_version {settings['format_version']} stores weights as vLLM cannot "
            "read them; load the model with sq_cpu.load and save it again"
        )
    record = record_of_settings(settings, path)
    _check(record)
    return Linears(
        {
            name: LayerKind(
                record.layer_scheme(name), name in record.smoothed, record.hadamard.get(name, 0)
            )
            for name in record.layers
        }
    )


def check_model_type(model_type: object) -> None:
    """Raise `SqCpuError` for a model whose linears vLLM would transpose, or take apart."""
    if model_type in _ABSORBED:
        raise SqCpuError(
            f"vLLM takes weights of {model_type}'s attention apart, which are packed; serve this "
            "model with sq-cpu serve"
        )
    if model_type in _TRANSPOSED:
        raise SqCpuError(
            f"vLLM transposes the weights of {model_type}, which sq_cpu stores as those of "
            "linears; serve this model with sq-cpu serve"
        )


def columns_here(kind: LayerKind, name: str, here: int, whole: int) -> int:
    """Return the columns of a weight of which `here` of `whole` input channels are on this rank.

    Raises `SqCpuError` where blocks of a rotation would be cut.
    """
    if kind.hadamard and here != whole and here % BLOCK:
        raise SqCpuError(
            f"{name} rotates its input in blocks of {BLOCK} channels, and tensor parallelism gives "
            f"{here} of {whole} to a rank; take another tensor_parallel_size, or quantize with "
            "hadamard=0 (--no-hadamard)"
        )
    return weight_columns(here, kind.hadamard)


def _check(record: QuantizationRecord) -> None:
    schemes = {name: record.layer_scheme(name).activations for name in record.layers}
    per_tensor = [name for name, activations in schemes.items() if activations == "per_tensor"]
    head = [name for name in record.layers if name.rpartition(".")[2] in ("lm_head", "embed_out")]
    refused: list[tuple[Any, str, str]] = [
        (
            per_tensor,
            "O2 takes one scale for all tokens of a call, which in vLLM are of several requests",
            "quantize with O1 or O3",
        ),
        (
            record.prefix,
            f"a prefix of {len(record.prefix)} tokens with keys and values in float, which vLLM's "
            "cache has no place for",
            "quantize without prefix",
        ),
        (
            list(record.decomposed),
            "channels in float beside int8 ones (outlier_threshold, massive channels)",
            "quantize without them",
        ),
        (
            [*record.embeddings.values(), *head],
            "an int8 head, which vLLM computes in float",
            "quantize without head='int8' (--head int8), and with lm_head in ignore",
        ),
        (
            [name for name in (*record.layers, *record.kept) if ".experts" in name],
            "experts, which vLLM computes by kernels of its own",
            "serve it with sq-cpu serve",
        ),
        (
            list(record.dtypes),
            "linears that compute in a dtype of their own",
            "serve it with sq-cpu serve",
        ),
    ]
    for found, what, fix in refused:
        if found:
            raise SqCpuError(f"vLLM cannot serve this model ({found[0]}): {what}; {fix}")


def _input_of(kind: LayerKind | None) -> object:
    """Return how the input is quantized; weights may have scales of different granularity."""
    if kind is None:
        return None
    return kind.settings((1.0, 0) if kind.is_static else None), kind.smoothed
