"""A decoder's forward as one native call: which stages it has, and that they are the model's.

`compile_program` lowers the model that it is given by the row of its family (`Decoder`): a stage is
what lies between two barriers of the threads (cpp/include/sq_cpu/program.h). What attention does
(scale, window, soft-cap, sinks, rotary tables) is not claimed by the row but seen in a call of the
model, and each block is proven against its own module before the program is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import _core
from sq_cpu.kernels.paged_attention import PAGE_TOKENS, BatchRows, KvPages
from sq_cpu.models.calls import evaluating
from sq_cpu.models.families import family_of
from sq_cpu.models.family import Decoder
from sq_cpu.models.hf_private import attention_calls, is_transformers
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.linear import QuantLinear

__all__ = ["DecoderProgram", "compile_program"]

_MOST_ERROR = 0.05
_TOKENS = 24  # of the call in which a model is seen
_ROTARY_ROWS = 512  # positions that a rotary table grows by
_ACTIVATIONS = {
    "relu": _core.Activation.relu,
    "gelu": _core.Activation.gelu,
    "gelu_new": _core.Activation.gelu_tanh,
    "gelu_pytorch_tanh": _core.Activation.gelu_tanh,
    "silu": _core.Activation.silu,
    "swish": _core.Activation.silu,
}


@dataclass
class _Seen:
    """What a call of the model showed."""

    ids: Tensor
    multiplier: float = 1.0
    options: dict[nn.Module, Mapping[str, Any]] = field(default_factory=dict)
    """Of each attention: the keyword arguments of its attention function."""
    positions: dict[nn.Module, tuple[Any, ...]] = field(default_factory=dict)
    """Of each attention: what its rotary embedding was called with, beside x and positions."""
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    """Of each block: [1, tokens, hidden]."""


@dataclass(frozen=True)
class _Part:
    """Rows of a linear, as a stage takes them."""

    layer: QuantLinear
    begin: int
    end: int
    columns: Tensor | None = None
    column_weight: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.end - self.begin


class DecoderProgram:
    """A decoder's forward, from token ids to the residual after the last block.

    Attributes
    ----------
    hidden_size : width of the residual
    cache_shapes : (kv heads, head size) of each layer that has a cache
    """

    def __init__(
        self,
        model: Any,
        decoder: Decoder,
        norm_offset: float,
        seen: _Seen,
        blocks: Sequence[int] | None = None,
        embedding: Tensor | None = None,
    ) -> None:
        """Lower some blocks, or all; `compile_program` has the checks and the proof."""
        self._program = _core.Program()
        self._base = model.base_model
        self._decoder = decoder
        self._norm_offset = norm_offset
        self._rotary_keys: list[tuple[Any, ...]] = []
        self._rotary_length = 0
        self._caches: list[KvPages] = []
        self.cache_shapes: list[tuple[int, int]] = []
        table = _find(self._base, decoder.embedding).weight.detach()
        self.hidden_size: int = table.shape[1]
        self._residual = self._program.buffer(self.hidden_size)
        self._buffers: dict[tuple[str, int], int] = {}
        if embedding is None:
            self._program.embed(table, seen.multiplier, self._residual)
        else:
            self._program.embed(embedding, 1.0, self._residual)
        stack = _find(self._base, decoder.blocks)
        for index in range(len(stack)) if blocks is None else blocks:
            self._add_block(stack[index], seen)
        self._program.result(self._residual)

    def _buffer(self, name: str, width: int) -> int:
        if (name, width) not in self._buffers:
            self._buffers[name, width] = self._program.buffer(width)
        return self._buffers[name, width]

    def _add_block(self, block: nn.Module, seen: _Seen) -> None:
        decoder, residual = self._decoder, self._residual
        attention = _find(block, decoder.attention)
        options = seen.options[attention]
        qkv = [_parts(block, path) for path in decoder.qkv]
        head_dim: int = attention.head_dim
        widths = [part.out_features for part in qkv]
        out = _parts(block, decoder.attention_out)
        heads = out.layer.in_features // head_dim
        kv_heads = (sum(widths) // head_dim - heads) // 2
        if sum(widths) != (heads + 2 * kv_heads) * head_dim:
            raise SqCpuError(f"{decoder.attention}: q, k and v of {widths} rows are not whole heads")
        projected = self._buffer("qkv", sum(widths))
        columns = [sum(widths[:i]) for i in range(len(widths))]
        self._project(
            residual,
            self._norm(block, decoder.attention_norm),
            [self._linear(part, projected, at) for part, at in zip(qkv, columns, strict=True)],
            qkv,
        )
        attended = self._buffer("attended", heads * head_dim)
        self._program.attend(
            projected,
            0,
            heads * head_dim,
            (heads + kv_heads) * head_dim,
            heads,
            kv_heads,
            head_dim,
            self._norm(block, decoder.q_norm, head_dim),
            self._norm(block, decoder.k_norm, head_dim),
            self._rotary(block, attention, seen),
            len(self.cache_shapes),
            options["scaling"],
            options.get("sliding_window") or 0,
            options.get("softcap") or 0.0,
            None,
            _floats(options.get("s_aux")),
            attended,
        )
        self.cache_shapes.append((kv_heads, head_dim))
        self._add(block, attended, out, decoder.after_attention)
        gate, up = _gate_up(block, decoder.gate_up)
        down = _parts(block, decoder.down)
        raised, gated = (self._buffer(name, down.layer.in_features) for name in ("up", "gated"))
        name = getattr(self._base.config, decoder.activation)
        if name not in _ACTIVATIONS:
            raise SqCpuError(f"config.{decoder.activation} is {name!r}")
        activation = _ACTIVATIONS[name]
        self._project(
            residual,
            self._norm(block, decoder.mlp_norm),
            [
                self._linear(up, raised),
                self._linear(gate, gated, activation=activation, other=raised),
            ],
            [up, gate],
        )
        self._add(block, gated, down, decoder.after_mlp)

    def _add(self, block: nn.Module, source: int, part: _Part, norm: str | None) -> None:
        """Add a linear to the residual, or its norm."""
        if norm is None:
            linear = self._linear(part, self._residual, accumulate=True)
            return self._project(source, None, [linear], [part])
        apart = self._buffer("apart", part.out_features)
        self._project(source, None, [self._linear(part, apart)], [part])
        self._program.merge(apart, self._norm(block, norm), self._residual)

    def _project(
        self, source: int, norm: Any, linears: list[Any], parts: Sequence[_Part]
    ) -> None:
        quantizer = parts[0].layer._quantizer
        if any(part.layer._quantizer != quantizer for part in parts):
            raise SqCpuError("linears of one input quantize it differently")
        self._program.project(source, 0, norm, quantizer, False, linears)

    def _linear(
        self,
        part: _Part,
        out: int,
        column: int = 0,
        *,
        activation: Any = _core.Activation.none,
        other: int = -1,
        accumulate: bool = False,
    ) -> tuple[Any, ...]:
        layer = part.layer
        strip = _core.packed_bytes(16, layer.in_features)
        packed = layer.packed[part.begin // 16 * strip :][: -(-part.out_features // 16) * strip]
        return (
            packed,
            part.out_features,
            layer.in_features,
            out,
            column,
            activation,
            other,
            accumulate,
            part.columns,
            part.column_weight,
        )

    def _norm(self, block: nn.Module, path: str | None, size: int = 0) -> Any:
        norm = None if path is None else _find(block, path, optional=True)
        if norm is None:
            return None
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        kind = _core.NormKind.layer if isinstance(norm, nn.LayerNorm) else _core.NormKind.rms
        weight = norm.weight.detach().float() + self._norm_offset
        if eps is None or (size and weight.shape != (size,)):
            raise SqCpuError(f"{path} is a {type(norm).__name__} over {list(weight.shape)}")
        return kind, weight, _floats(getattr(norm, "bias", None)), eps

    def _rotary(self, block: nn.Module, attention: nn.Module, seen: _Seen) -> int:
        used = _find(block, self._decoder.uses_rotary, optional=True)
        if attention not in seen.positions or used in (False, 0):
            return -1
        key = seen.positions[attention]
        if key not in self._rotary_keys:
            self._rotary_keys.append(key)
        return self._rotary_keys.index(key)

    def grow(self, positions: int) -> None:
        """Make rotary tables for so many positions, or more."""
        if positions <= self._rotary_length:
            return
        length = -(-positions // _ROTARY_ROWS) * _ROTARY_ROWS
        rotary = _find(self._base, self._decoder.rotary)
        at = torch.arange(length, device="cpu")[None]
        tables = []
        for key in self._rotary_keys:
            cos, sin = rotary(torch.zeros(1, length, 1), at, *key)
            tables.append((_rotary_table(cos[0], sin[0], self._decoder.interleaved), False))
        self._program.set_rotaries([(t, self._decoder.interleaved) for t, _ in tables])
        self._rotary_length = length

    def run(
        self,
        ids: Tensor,
        positions: Tensor,
        rows: BatchRows,
        caches: Sequence[KvPages],
        kept: Tensor,
        threads: int = 0,
    ) -> Tensor:
        """Run the blocks over new tokens, whose keys and values go into the caches.

        Parameters
        ----------
        ids, positions : int64 [rows], one sequence after another
        rows : which rows belong to which sequence, and in which pages that lies
        caches : the pages of each layer
        kept : int64 [kept], ascending: the rows whose result is wanted
        threads : of torch's, at most; 0: all

        Returns
        -------
        fp32 [kept, hidden_size], the residual after the last block

        Raises
        ------
        SqCpuError
            For ids and positions that there are not, and for caches of other shapes.
        """
        if self._caches != list(caches):
            self._program.set_caches([(pages._pages, pages.head_dim) for pages in caches])
            self._caches = list(caches)
        self.grow(int(positions.max()) + 1 if len(positions) else 0)
        result = torch.empty((len(kept), self.hidden_size), dtype=torch.float32, device="cpu")
        self._program.run(ids, positions, *rows.tensors, kept, result, threads)
        return result


def _find(module: Any, path: str, *, optional: bool = False) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            if optional:
                return None
            raise SqCpuError(f"the model has no {path}")
    return module


def _parts(block: nn.Module, path: str) -> _Part:
    """Return a linear with all of its rows."""
    layer = _find(block, path)
    columns = column_weight = None
    if isinstance(layer, DecomposedLinear):
        columns = layer.columns
        column_weight = layer.outlier_weight.detach().float().T.contiguous()
        layer = layer.regular
    if type(layer) is not QuantLinear:
        raise SqCpuError(f"{path} is a {type(layer).__name__}, not in int8")
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        raise SqCpuError(f"{path} has hooks or a forward of its own")
    return _Part(layer, 0, layer.out_features, columns, column_weight)


def _gate_up(block: nn.Module, paths: tuple[str, ...]) -> list[_Part]:
    if len(paths) == 2:
        return [_parts(block, path) for path in paths]
    (whole,) = (_parts(block, path) for path in paths)
    half = whole.out_features // 2
    if half % 16 or whole.columns is not None:
        raise SqCpuError(f"{paths[0]}: gate and up share a strip of 16 rows, or have float columns")
    return [_Part(whole.layer, 0, half), _Part(whole.layer, half, 2 * half)]


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def _rotary_table(cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return [positions, 2, channels]: cos, and sin with the sign that its product is added with."""
    sign = torch.ones(cos.shape[1])
    if interleaved:
        cos, sin = (x[:, : x.shape[1] // 2].repeat_interleave(2, dim=1) for x in (cos, sin))
        sign[::2] = -1
    else:
        sign[: len(sign) // 2] = -1
    return torch.stack((cos.float(), sin.float() * sign), dim=1).contiguous()


def _see(model: Any, decoder: Decoder) -> _Seen:
    base = model.base_model
    vocabulary = _find(base, decoder.embedding).weight.shape[0]
    seen = _Seen((torch.arange(_TOKENS) * 7919 % vocabulary)[None])
    calls: list[tuple[Any, tuple[Any, ...]]] = []  # what rotary gave, and what for
    handles = []

    def rotary_called(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((output, (*args[2:], *(v for k, v in kwargs.items() if k == "layer_type"))))

    def attention_called(module: nn.Module, _: Any, kwargs: Any) -> None:
        given = kwargs.get("position_embeddings")
        for output, key in calls:
            if given is output or (given is not None and given[0] is output[0]):
                seen.positions[module] = key

    def block_called(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.inputs.append((args[0] if args else kwargs["hidden_states"]).detach().clone())
        seen.outputs.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    rotary = _find(base, decoder.rotary, optional=True)
    if rotary is not None:
        handles.append(rotary.register_forward_hook(rotary_called, with_kwargs=True))
    for block in _find(base, decoder.blocks):
        attention = _find(block, decoder.attention)
        handles.append(attention.register_forward_pre_hook(attention_called, with_kwargs=True))
        handles.append(block.register_forward_hook(block_called, with_kwargs=True))
    try:
        with attention_calls(model, lambda module, kwargs: seen.options.update({module: kwargs})):
            base(input_ids=seen.ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    rows = _find(base, decoder.embedding).weight.detach()[seen.ids[0]].float()
    first = seen.inputs[0][0].float()
    seen.multiplier = float((first * rows).sum() / (rows * rows).sum())
    if not torch.allclose(first, rows * seen.multiplier, rtol=1e-2, atol=1e-6):
        raise SqCpuError("what enters the first block is not the embedding alone")
    return seen


def _prove(model: Any, decoder: Decoder, norm_offset: float, seen: _Seen) -> None:
    """Raise `SqCpuError` for a block whose stages do something else than the block did.

    Each runs alone on the input that the block had: as if that were the embedding of tokens 0, 1, 2
    and so on. Linears are the same in both but for a few codes that an ulp turns over; attention is
    int8 in the one alone.
    """
    count = seen.ids.shape[1]
    at = torch.arange(count, device="cpu")
    rows = BatchRows([count], [count], [range(-(-count // PAGE_TOKENS))])
    for index, (x, y) in enumerate(zip(seen.inputs, seen.outputs, strict=True)):
        alone = DecoderProgram(model, decoder, norm_offset, seen, [index], x[0])
        caches = [KvPages(1, *shape) for shape in alone.cache_shapes]
        update, wanted = (z.float() - x[0].float() for z in (alone.run(at, at, rows, caches, at), y[0]))
        error = float((update - wanted).norm() / wanted.norm())
        print(index, error)
        if not error <= _MOST_ERROR:
            raise SqCpuError(
                f"{decoder.blocks}.{index} does something else than its row says: what its stages "
                f"add to the residual is {100 * error:.0f} % off"
            )


@torch.no_grad()
def compile_program(model: Any) -> DecoderProgram:
    """Lower a quantized decoder of transformers to a program.

    Raises
    ------
    SqCpuError
        That says why it cannot be: no row for its family, a linear that is not in int8, a block
        that does something else than its row says.
    """
    if not is_transformers(model):
        raise SqCpuError(f"no program for a {type(model).__name__}: not a model of transformers")
    family = family_of(model)
    if family is None or family.decoder is None:
        raise SqCpuError(f"no program for {model.config.model_type}: its family has no decoder row")
    offset = family.stacks[0].norm_offset
    with evaluating(model):
        try:
            seen = _see(model, family.decoder)
            _prove(model, family.decoder, offset, seen)
            return DecoderProgram(model, family.decoder, offset, seen)
        except SqCpuError as error:
            raise SqCpuError(f"no program for {model.config.model_type}: {error}") from error
