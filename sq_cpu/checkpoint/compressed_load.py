"""A compressed-tensors model as a checkpoint of ours: the same integers under our names, or floats.

Inputs are rounded as there. A static symmetric grid has the codes -128 to 127, which is our
asymmetric one with the zero point 128. A dynamic symmetric one spans 127 steps here, as in vLLM;
compressed-tensors itself takes 127.5. No row gets a scale of its own (`Scheme.dynamic_fallback`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sq_cpu.checkpoint.compressed_config import CompressedConfig
from sq_cpu.checkpoint.compressed_layers import GET_AGAIN, CompressedLayer, layer_names
from sq_cpu.checkpoint.config import CONFIG
from sq_cpu.checkpoint.stored import Header, StoredTensors, weight_files
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.runtime import has_vnni
from sq_cpu.quantization.record import QuantizationRecord
from sq_cpu.scheme import Activations, Scheme
from sq_cpu.smoothing.plan import LayerPlan, SmoothPlan

__all__ = ["CompressedTensors", "compressed_config", "open_compressed", "record_of_layers"]


def compressed_config(folder: Path, settings: Mapping[str, Any]) -> CompressedConfig:
    """Read the quantization_config of a folder; `SqCpuError` for what is not read."""
    return CompressedConfig.of(settings, folder / CONFIG)


@contextmanager
def open_compressed(
    folder: Path, config: CompressedConfig, *, as_float: bool
) -> Iterator[CompressedTensors]:
    """Yield the tensors of a folder's model, as int8 or `as_float`."""
    with StoredTensors(folder, weight_files(folder, GET_AGAIN)) as stored:
        tensors = CompressedTensors(stored, config, as_float=as_float)
        if not tensors.layers:
            raise SqCpuError(f"{folder} has no tensors of quantized linears; {GET_AGAIN}")
        yield tensors


class CompressedTensors:
    """The tensors of a compressed-tensors model under the names that ours have, made when read."""

    def __init__(self, stored: StoredTensors, config: CompressedConfig, *, as_float: bool) -> None:
        self._stored = stored
        self.nbytes = stored.nbytes
        self.layers = [CompressedLayer(n, config, stored) for n in layer_names(stored.headers)]
        self.headers: dict[str, Header] = {}
        self._made: dict[str, tuple[CompressedLayer, Callable[[], Tensor]]] = {}
        theirs = {f"{layer.name}.{field}" for layer in self.layers for field in layer.headers}
        for name, header in stored.headers.items():
            if name.rpartition(".")[2].endswith("_scale") and name not in theirs:
                raise SqCpuError(
                    f"{stored.path(name)}: tensor {name} has no integers that it scales; "
                    f"{GET_AGAIN}"
                )
            if name not in theirs:
                self.headers[name] = header
        for layer in self.layers:
            for field, (header, make) in (_floats if as_float else _int8)(layer).items():
                self.headers[f"{layer.name}.{field}"] = header
                self._made[f"{layer.name}.{field}"] = layer, make

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor, or what it is made of."""
        made = self._made.get(name)
        return self._stored.path(name if made is None else made[0].codes_name)

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        made = self._made.get(name)
        return self._stored.read(name) if made is None else made[1]()


_Entries = dict[str, tuple[Header, Callable[[], Tensor]]]


def _int8(layer: CompressedLayer) -> _Entries:
    """Return what our checkpoint stores of a layer: header, and what makes the tensor."""
    rows, columns = layer.out_features, layer.in_features
    if layer.scales_per_row > 1:
        layer.row_scales()  # says why not
    entries: _Entries = {
        "weight": (
            Header((rows, columns, 1), torch.int8),
            lambda: layer.codes().unsqueeze(-1),
        ),
        "weight_scale": (Header((rows,), torch.float32), layer.row_scales),
    }
    if "bias" in layer.headers:
        entries["bias"] = Header((rows,), torch.float32), lambda: layer.bias().float()
    if layer.group.activations == "static":
        entries["input_scale"] = Header((), torch.float32), lambda: layer.static()[0]
        entries["input_zero_point"] = Header((), torch.int32), lambda: layer.static()[1]
    return entries


def _floats(layer: CompressedLayer) -> _Entries:
    shape = layer.out_features, layer.in_features
    entries: _Entries = {"weight": (Header(shape, torch.float32), layer.weight)}
    if "bias" in layer.headers:
        entries["bias"] = layer.headers["bias"], layer.bias
    return entries


def record_of_layers(
    layers: list[CompressedLayer], scheme: str | Scheme | None, where: Path
) -> QuantizationRecord:
    """Return what was done to a model, of its layers, each exactly int8.

    `scheme` is of the activations of layers that have only their weights quantized.

    Raises `SqCpuError` where those have none, or one that a calibration would have to fill, where
    none takes it, and where layers round their inputs in ways that one `Scheme` cannot say.
    """
    chosen = None if scheme is None else Scheme.of(scheme).resolve(has_vnni())
    bare = [layer.name for layer in layers if layer.group.activations is None]
    if chosen is not None and not bare:
        raise SqCpuError(f"{where}: the activations are quantized already; leave out scheme")
    if bare and chosen is None:
        raise SqCpuError(
            f"{where}: {bare[0]} has inputs in float; give load a scheme for int8 ones, as in "
            'scheme="O1", or have sq-cpu quantize make int8 of its floats'
        )
    if chosen is not None and chosen.needs_calibration:
        raise SqCpuError(
            f"{where}: {chosen.activations} activations of this scheme need a calibration: give "
            'scheme="O1", or have sq-cpu quantize make int8 of its floats'
        )
    if chosen is not None and chosen.reduce_range and len(bare) < len(layers):
        raise SqCpuError(f"{where}: other inputs have 8 bits; give a scheme without reduce_range")
    base = chosen or Scheme()
    kinds: dict[str, Activations] = {
        layer.name: layer.group.activations or base.activations for layer in layers
    }
    symmetric = _symmetric(layers, kinds, chosen, where)
    usual = Counter(kinds.values()).most_common(1)[0][0] if kinds else base.activations
    per_tensor = bool(layers) and all(layer.group.strategy == "tensor" for layer in layers)
    made = replace(
        base.with_activations(usual),
        symmetric=symmetric,
        dynamic_fallback=False,
        weights="per_tensor" if per_tensor else "per_channel",
        rows_per_scale=Scheme.rows_per_scale,
    )
    others = tuple(
        LayerPlan(name=name, activations=kind) for name, kind in kinds.items() if kind != usual
    )
    plan = SmoothPlan((), others, made) if others else None
    return QuantizationRecord(scheme=made, plan=plan, layers=tuple(kinds))


def _symmetric(
    layers: list[CompressedLayer],
    kinds: Mapping[str, Activations],
    chosen: Scheme | None,
    where: Path,
) -> bool:
    """Say whether the scheme of all layers is symmetric.

    Static symmetric inputs are asymmetric ones with a zero point of 128, to the bit, unless others
    ask for a symmetric scheme: then their codes end at -127 in the place of -128.
    """
    dynamic = {
        (chosen or Scheme()).symmetric if layer.group.activations is None else layer.group.symmetric
        for layer in layers
        if kinds[layer.name] != "static"
    }
    static = {layer.group.symmetric for layer in layers if kinds[layer.name] == "static"}
    if dynamic == {True} and False not in static:
        return True
    if True not in dynamic:
        return False
    raise SqCpuError(
        f"{where}: some dynamic inputs are symmetric, and other inputs are not, which one Scheme "
        "cannot say; compress the model with inputs that are alike"
    )
