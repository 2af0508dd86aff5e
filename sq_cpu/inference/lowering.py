"""A quantized decoder of transformers becomes a program.

The row of its family says where the parts are. What attention does (scale, window, soft-cap, sinks,
rotary tables) is not claimed by the row but seen in a call of the model. Each block is then proven:
without int8 its stages compute what its module does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.attention import attention_in_floats
from sq_cpu.inference.program import (
    Attend,
    DecoderProgram,
    Embed,
    Linear,
    Merge,
    Norm,
    Project,
    Rotary,
    Stage,
    run_reference,
)
from sq_cpu.kernels.paged_attention import AttentionOptions
from sq_cpu.models.calls import evaluating
from sq_cpu.models.families import family_of
from sq_cpu.models.family import Decoder
from sq_cpu.models.hf_private import attending_by, is_transformers
from sq_cpu.models.hooks import hooked
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.embedding import QuantEmbedding
from sq_cpu.nn.linear import QuantLinear

__all__ = ["compile_program"]

_TOKENS = 24  # of the call in which a model is seen
# Of what a block adds to the residual: both are fp32 sums, of up to some 10^4 terms.
_MOST_ERROR = 1e-4
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


@torch.no_grad()
def compile_program(model: Any) -> DecoderProgram:
    """Lower a quantized decoder to a program: from token ids to the residual after the last block.

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
    try:
        with evaluating(model), _in_float32(model):
            lowering = _Lowering(model, family.decoder, family.stacks[0].norm_offset)
            lowering.prove()
        return lowering.program()
    except SqCpuError as error:
        raise SqCpuError(f"no program for {model.config.model_type}: {error}") from error


@dataclass
class _Seen:
    """What a call of the model showed."""

    ids: Tensor
    """int64 [1, tokens]."""
    multiplier: float = 1.0
    """Of the embedding."""
    options: dict[nn.Module, Mapping[str, Any]] = field(default_factory=dict)
    """Of each attention: the keyword arguments of its attention function."""
    rotaries: dict[nn.Module, tuple[Any, ...]] = field(default_factory=dict)
    """Of each attention: what its rotary embedding was called with, beside x and positions."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """Of each block: its arguments, hidden states first."""


class _Lowering:
    def __init__(self, model: Any, decoder: Decoder, norm_offset: float) -> None:
        self._base = model.base_model
        self._decoder = decoder
        self._norm_offset = norm_offset
        self._widths: dict[str, int] = {}
        self._rotaries: dict[tuple[Any, ...], Rotary] = {}
        self._model = model
        self._seen = self._see()
        self._buffer("residual", _find(self._base, decoder.embedding).weight.shape[1])
        self._blocks = [self._stages(block) for block in _find(self._base, decoder.blocks)]

    def program(self) -> DecoderProgram:
        embedding = _find(self._base, self._decoder.embedding)
        embed = Embed(_table(embedding), self._seen.multiplier, "residual")
        stages = [embed, *(stage for block in self._blocks for stage in block)]
        final_norm = self._norm(self._base, self._decoder.final_norm)
        return DecoderProgram(stages, self._widths, "residual", final_norm)

    def prove(self) -> None:
        """Raise `SqCpuError` for a block whose stages do something else than the block does.

        Both compute with the int8 weights as floats, on the input that the block had.
        """
        blocks = _find(self._base, self._decoder.blocks)
        at = torch.arange(self._seen.ids.shape[1], device="cpu")
        with attending_by(self._model, attention_in_floats):
            for index, stages in enumerate(self._blocks):
                args, kwargs = self._seen.calls[index]
                x = args[0][0]
                with _dequantized(blocks[index]) as weights:
                    wanted = _hidden(blocks[index](*args, **kwargs))[0] - x
                    stages = [Embed(x, 1.0, "residual"), *stages]
                    found = run_reference(stages, at, weights.__getitem__)["residual"] - x
                error = float((found - wanted).norm() / wanted.norm())
                if not error <= _MOST_ERROR:
                    raise SqCpuError(
                        f"{self._decoder.blocks}.{index} does something else than its row says: "
                        f"without int8 its stages are {100 * error:.2g} % off"
                    )

    def _see(self) -> _Seen:
        decoder, base = self._decoder, self._base
        embed = Embed(_table(_find(base, decoder.embedding)), 1.0, "residual")
        seen = _Seen((torch.arange(_TOKENS, device="cpu") * 7919 % embed.vocabulary)[None])
        tables: list[tuple[Any, tuple[Any, ...]]] = []  # what rotary gave, and for what

        def rotary_called(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            extra = (value for name, value in kwargs.items() if name not in ("x", "position_ids"))
            tables.append((output, (*args[2:], *extra)))

        def attention_called(module: nn.Module, _: Any, kwargs: Any) -> None:
            given = kwargs.get("position_embeddings")
            for output, key in tables:
                if given is not None and given[0] is output[0]:
                    seen.rotaries[module] = key

        def block_called(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            seen.calls.append(((x.clone(), *args[1:]), rest))

        def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.options[module] = kwargs
            return attention_in_floats(module, *args, **kwargs)

        rotary = _find(base, decoder.rotary, optional=True)
        after = [] if rotary is None else [(rotary, rotary_called)]
        blocks = _find(base, decoder.blocks)
        before: list[tuple[nn.Module, Any]] = [(block, block_called) for block in blocks]
        before += [(_find(block, decoder.attention), attention_called) for block in blocks]
        with hooked(before=before, after=after), attending_by(self._model, attend):
            base(input_ids=seen.ids, use_cache=False)
        first, rows = seen.calls[0][0][0][0], embed.rows(seen.ids[0])
        seen.multiplier = float((first * rows).sum() / (rows * rows).sum())
        if not torch.allclose(first, rows * seen.multiplier, rtol=1e-3, atol=1e-7):
            raise SqCpuError("what enters the first block is not a token's embedding alone")
        return seen

    def _buffer(self, name: str, width: int) -> str:
        if self._widths.setdefault(name, width) != width:
            raise SqCpuError(f"blocks of different sizes: {name} of {self._widths[name]}, {width}")
        return name

    def _stages(self, block: nn.Module) -> list[Stage]:
        decoder = self._decoder
        attention = _find(block, decoder.attention)
        if attention not in self._seen.options:
            raise SqCpuError(f"{decoder.attention} does not attend through transformers' interface")
        head_dim: int = attention.head_dim
        qkv = [_layer(block, path) for path in decoder.qkv]
        widths = [layer.out_features for layer in qkv]
        out = _layer(block, decoder.attention_out)
        heads = out.in_features // head_dim
        kv_heads = (sum(widths) // head_dim - heads) // 2
        if sum(widths) != (heads + 2 * kv_heads) * head_dim:
            raise SqCpuError(f"{decoder.qkv}: q, k and v of {widths} rows are no whole heads")
        projected = self._buffer("qkv", sum(widths))
        attended = self._buffer("attended", out.in_features)
        columns = [sum(widths[:i]) for i in range(len(widths))]
        into_attention: list[Stage] = [
            Project(
                "residual",
                self._norm(block, decoder.attention_norm),
                tuple(
                    _linear(layer, projected, column=at)
                    for layer, at in zip(qkv, columns, strict=True)
                ),
            ),
            Attend(
                projected,
                heads,
                kv_heads,
                head_dim,
                self._norm(block, decoder.q_norm),
                self._norm(block, decoder.k_norm),
                self._rotary(block, attention),
                _options(self._seen.options[attention]),
                attended,
            ),
        ]
        out_of_attention = self._add(block, attended, out, decoder.after_attention)
        into_mlp = self._into_mlp(block)
        down = _layer(block, decoder.down)
        out_of_mlp = self._add(block, "hidden", down, decoder.after_mlp)
        if self._parallel():
            return [*into_attention, into_mlp, *out_of_attention, *out_of_mlp]
        return [*into_attention, *out_of_attention, into_mlp, *out_of_mlp]

    def _into_mlp(self, block: nn.Module) -> Project:
        decoder = self._decoder
        hidden = self._buffer("hidden", _layer(block, decoder.down).in_features)
        name = getattr(self._base.config, decoder.activation)
        if name not in _ACTIVATIONS:
            raise SqCpuError(f"config.{decoder.activation} is {name!r}")
        activation = _ACTIVATIONS[name]
        if decoder.gated:
            raised = self._buffer("raised", self._widths[hidden])
            (gate, gate_rows), (up, up_rows) = _gate_up(block, decoder.gate_up)
            linears: tuple[Linear, ...] = (
                _linear(up, raised, rows=up_rows),
                _linear(gate, hidden, rows=gate_rows, activation=activation, other=raised),
            )
        else:
            (path,) = decoder.gate_up
            linears = (_linear(_layer(block, path), hidden, activation=activation),)
        norm = self._norm(block, decoder.mlp_norm)
        if norm is None and self._parallel():
            norm = self._norm(block, decoder.attention_norm)
        return Project("residual", norm, linears)

    def _parallel(self) -> bool:
        parallel = self._decoder.parallel
        return bool(getattr(self._base.config, parallel) if isinstance(parallel, str) else parallel)

    def _add(
        self, block: nn.Module, source: str, layer: QuantLinear | DecomposedLinear, norm: str | None
    ) -> list[Stage]:
        """Add a linear to the residual, or the norm of it."""
        if norm is None:
            return [Project(source, None, (_linear(layer, "residual", accumulate=True),))]
        apart = self._buffer("apart", layer.out_features)
        after = self._norm(block, norm)
        if after is None:
            raise SqCpuError(f"a block has no {norm}")
        return [Project(source, None, (_linear(layer, apart),)), Merge(apart, after, "residual")]

    def _norm(self, block: nn.Module, path: str | None) -> Norm | None:
        norm = None if path is None else _find(block, path, optional=True)
        if norm is None:
            return None
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if not isinstance(eps, float):
            raise SqCpuError(f"{path} is a {type(norm).__name__}, which has no eps")
        return Norm(
            "layer" if isinstance(norm, nn.LayerNorm) else "rms",
            norm.weight.detach().float() + self._norm_offset,
            _floats(getattr(norm, "bias", None)),
            eps,
        )

    def _rotary(self, block: nn.Module, attention: nn.Module) -> Rotary | None:
        used = _find(block, self._decoder.uses_rotary, optional=True)
        if attention not in self._seen.rotaries or (used is not None and not used):
            return None
        extra = self._seen.rotaries[attention]
        module = _find(self._base, self._decoder.rotary)
        kinds = _rope_types(module)
        if kinds & {"dynamic", "longrope"}:
            raise SqCpuError(f"rotary tables of type {kinds} depend on the sequence's length")

        @torch.no_grad()
        def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = module(torch.zeros(1, dtype=torch.float32), positions, *extra)
            return cos, sin

        return self._rotaries.setdefault(extra, Rotary(tables, self._decoder.interleaved))


def _find(module: Any, path: str, *, optional: bool = False) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            if optional:
                return None
            raise SqCpuError(f"the model has no {path}")
    return module


def _table(embedding: nn.Module) -> Tensor | QuantLinear:
    """Return what holds the rows of an embedding."""
    if isinstance(embedding, QuantEmbedding):
        return embedding.head
    weight: Tensor = embedding.weight.detach()  # type: ignore[operator]
    return weight


def _rope_types(rotary: Any) -> set[str]:
    kinds = getattr(rotary, "rope_type", "default")
    return set(kinds.values()) if isinstance(kinds, Mapping) else {kinds}


def _layer(block: nn.Module, path: str) -> QuantLinear | DecomposedLinear:
    layer = _find(block, path)
    if type(layer) not in (QuantLinear, DecomposedLinear):
        raise SqCpuError(f"{path} is a {type(layer).__name__}, not in int8")
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        raise SqCpuError(f"{path} has hooks, or a forward of its own")
    return layer  # type: ignore[no-any-return]


_Rows = tuple[int, int] | None


def _gate_up(
    block: nn.Module, paths: tuple[str, ...]
) -> list[tuple[QuantLinear | DecomposedLinear, _Rows]]:
    layers = [_layer(block, path) for path in paths]
    if len(layers) == 2:
        return [(layer, None) for layer in layers]
    rows = layers[0].out_features
    return [(layers[0], (0, rows // 2)), (layers[0], (rows // 2, rows))]


def _linear(
    layer: QuantLinear | DecomposedLinear,
    out: str,
    *,
    rows: _Rows = None,
    column: int = 0,
    activation: str | None = None,
    other: str | None = None,
    accumulate: bool = False,
) -> Linear:
    begin, end = rows or (0, layer.out_features)
    columns = weight = None
    if isinstance(layer, DecomposedLinear):
        columns = layer.columns
        weight = layer.outlier_weight.detach().float()[begin:end].T.contiguous()
        layer = layer.regular
    return Linear(layer, begin, end, out, column, activation, other, accumulate, columns, weight)


def _options(given: Mapping[str, Any]) -> AttentionOptions:
    return AttentionOptions(
        scale=float(given["scaling"]),
        window=given.get("sliding_window") or 0,
        softcap=given.get("softcap") or 0.0,
        sinks=_floats(given.get("s_aux")),
    )


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in fp32 meanwhile; after it every tensor is what it was."""
    tensors = [
        (x, x.data)
        for x in (*model.parameters(), *model.buffers())
        if x.is_floating_point() and x.dtype != torch.float32
    ]
    kinds = (QuantLinear, QuantEmbedding)
    layers = [(m, m.dtype) for m in model.modules() if isinstance(m, kinds)]
    for x, data in tensors:
        x.data = data.float()
    for layer, _ in layers:
        layer.dtype = torch.float32
    try:
        yield
    finally:
        for x, data in tensors:
            x.data = data
        for layer, dtype in layers:
            layer.dtype = dtype


@contextmanager
def _dequantized(block: nn.Module) -> Iterator[dict[QuantLinear, Tensor]]:
    """Make a block's linears float ones of the same weights meanwhile; yields those weights."""
    weights: dict[QuantLinear, Tensor] = {}
    replaced = []
    for parent in [*block.modules()]:
        for name, layer in [*parent.named_children()]:
            if not isinstance(layer, QuantLinear | DecomposedLinear):
                continue
            regular = layer.regular if isinstance(layer, DecomposedLinear) else layer
            weight = regular.weight_int8().float() * regular.weight_scale[:, None]
            if regular.smoothing is not None:
                weight /= regular.smoothing
            weights[regular] = weight
            if isinstance(layer, DecomposedLinear):
                weight = weight.index_copy(1, layer.columns, layer.outlier_weight.float())
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(weight, requires_grad=False)
            if regular.bias is not None:
                plain.bias = nn.Parameter(regular.bias, requires_grad=False)
            replaced.append((parent, name, layer))
            setattr(parent, name, plain)
    try:
        yield weights
    finally:
        for parent, name, layer in replaced:
            setattr(parent, name, layer)
