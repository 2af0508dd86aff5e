"""A quantized decoder of transformers becomes a program.

The row of its family says where the parts are. What attention does (scale, window, soft-cap, sinks,
rotary tables) is not claimed by the row but seen in a call of the model. Each block is then proven:
without int8 its stages compute what its module does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.attention import attention_in_floats
from sq_cpu.inference.observing import Seen, attending, find, is_altered, see, table_of
from sq_cpu.inference.parts import Layer, gate_and_up, layer_at, linear_of
from sq_cpu.inference.program import DecoderProgram
from sq_cpu.inference.proving import head_seen, in_float32, in_floats, no_weight, prove
from sq_cpu.inference.stages import (
    Add,
    Attend,
    Embed,
    Linear,
    Merge,
    Norm,
    Normalize,
    Positions,
    Project,
    Rotary,
    Route,
    Stage,
    run_reference,
)
from sq_cpu.kernels.paged_attention import AttentionOptions
from sq_cpu.models.bases import decoder_of
from sq_cpu.models.calls import evaluating
from sq_cpu.models.families import family_of
from sq_cpu.models.family import Decoder, Mixture
from sq_cpu.models.groups import config_value
from sq_cpu.models.hf_private import is_transformers
from sq_cpu.models.linears import head_of
from sq_cpu.nn.gathering import gather_weights
from sq_cpu.nn.linear import QuantLinear

__all__ = ["compile_program"]

_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
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
        That says why it cannot be: no row for its family, no linear in int8, a block that does
        something else than its row says.
    """
    if not is_transformers(model):
        raise SqCpuError(f"no program for a {type(model).__name__}: not a model of transformers")
    family = family_of(model)
    if family is None or family.decoder is None:
        raise SqCpuError(f"no program for {model.config.model_type}: its family has no decoder row")
    try:
        with evaluating(model), in_float32(model):
            lowering = _Lowering(model, family.decoder, family.stacks[0].norm_offset)
            lowering.prove_all()
        return lowering.program()
    except SqCpuError as error:
        raise SqCpuError(f"no program for {model.config.model_type}: {error}") from error


class _Lowering:
    def __init__(self, model: Any, decoder: Decoder, norm_offset: float) -> None:
        self._base: Any = decoder_of(model)
        self._decoder = decoder
        self._norm_offset = norm_offset
        self._widths: dict[str, int] = {}
        self._rotaries: dict[tuple[Any, ...], Rotary] = {}
        self._model = model
        for name, wanted in decoder.when.items():
            if (actual := config_value(model, name)) != wanted:
                raise SqCpuError(f"config.{name} is {actual!r}, and its row is for {wanted!r}")
        if not any(isinstance(m, QuantLinear) for m in self._blocks.modules()):
            raise SqCpuError("none of its linears is in int8: quantize it first")
        self._seen: Seen = see(model, self._base, decoder)
        self._multiplier = self._embedding_multiplier()
        cap = getattr(self._base.config, decoder.softcap, None) or 0.0
        self._head = head_seen(self._seen, head_of(model), cap)

    @property
    def _blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = find(self._base, self._decoder.blocks)
        return blocks

    def program(self) -> DecoderProgram:
        stages = self._embedding(self._multiplier)
        stages += (stage for block in self._blocks for stage in self._stages(block))
        projects = (stage for stage in stages if isinstance(stage, Project))
        layers: list[Any] = [linear.layer for project in projects for linear in project.linears]
        if self._head is not None:
            layers.append(self._head.layer)
        # In the order in which a step reads them.
        gather_weights(layer for layer in layers if isinstance(layer, QuantLinear))
        return DecoderProgram(
            stages,
            self._widths,
            "residual",
            self._norm(self._base, self._decoder.final_norm),
            self._head,
            output=self._seen.output,
            own_positions=self._decoder.own_positions,
        )

    def prove_all(self) -> None:
        """Raise `SqCpuError` for what does something else than its row says.

        A block and its stages both compute with the int8 weights as floats, on the input that the
        block had.
        """
        seen, blocks = self._seen, self._decoder.blocks
        at = torch.arange(seen.ids.shape[1], device="cpu")
        embedding = self._embedding(self._multiplier)
        entered = run_reference(embedding, seen.ids[0], no_weight)["residual"]
        prove(self._decoder.embedding, entered, seen.calls[0][0][0][0])
        with attending(self._model, self._decoder, attention_in_floats):
            for index, block in enumerate(self._blocks):
                args, kwargs = seen.calls[index]
                x = args[0][0]
                stages = [Embed(x, 1.0, "residual"), *self._stages(block)]
                with in_floats(block) as weights:
                    wanted = _hidden(block(*args, **kwargs))[0] - x
                    found = run_reference(stages, at, weights.__getitem__)["residual"] - x
                prove(f"{blocks}.{index}", found, wanted)
        norm = self._norm(self._base, self._decoder.final_norm)
        if seen.residual is not None and seen.hidden is not None:
            normed = seen.residual if norm is None else norm.reference(seen.residual)
            prove(self._decoder.final_norm, normed, seen.hidden)

    def _embedding(self, multiplier: float) -> list[Stage]:
        decoder = self._decoder
        table = table_of(find(self._base, decoder.embedding))
        width = table.in_features if isinstance(table, QuantLinear) else table.shape[1]
        out = self._buffer("residual", width)
        stages: list[Stage] = [Embed(table, multiplier, out)]
        if decoder.positions is not None:
            learned = find(self._base, decoder.positions)
            weight = learned.weight.detach().float().contiguous()
            self._buffer(out, weight.shape[1])
            stages.append(Positions(weight, getattr(learned, "offset", 0), out))
        norm = self._norm(self._base, decoder.embedding_norm)
        return [*stages, Normalize(out, 0, norm)] if norm is not None else stages

    def _embedding_multiplier(self) -> float:
        """Return what tokens' embeddings are multiplied by, which a norm would not show."""
        if self._decoder.embedding_norm is not None:
            return 1.0
        ids, entered = self._seen.ids[0], self._seen.calls[0][0][0][0]
        without, once = (
            run_reference(self._embedding(factor), ids, no_weight)["residual"]
            for factor in (0.0, 1.0)
        )
        self._buffer("residual", entered.shape[1])
        rows = once - without
        found = float(((entered - without) * rows).sum() / (rows * rows).sum())
        return 1.0 if abs(found - 1) < 1e-6 else found  # what learned positions round

    def _buffer(self, name: str, width: int) -> str:
        if self._widths.setdefault(name, width) != width:
            raise SqCpuError(f"blocks of different sizes: {name} of {self._widths[name]}, {width}")
        return name

    def _stages(self, block: nn.Module) -> list[Stage]:
        decoder = self._decoder
        attention = find(block, decoder.attention)
        if attention not in self._seen.options and not decoder.own_attention:
            raise SqCpuError(f"{decoder.attention} does not attend through transformers' interface")
        head_dim: int = find(attention, decoder.head_dim)
        qkv = [layer_at(block, path) for path in decoder.qkv]
        widths = [layer.out_features for layer in qkv]
        out = layer_at(block, decoder.attention_out)
        heads = out.in_features // head_dim
        kv_heads = (sum(widths) // head_dim - heads) // 2
        if sum(widths) != (heads + 2 * kv_heads) * head_dim:
            raise SqCpuError(f"{decoder.qkv}: q, k and v of {widths} rows are no whole heads")
        projected = self._buffer("qkv", sum(widths))
        attended = self._buffer("attended", out.in_features)
        columns = [sum(widths[:i]) for i in range(len(widths))]
        (q_norm, k_norm), whole = self._head_norms(block, projected, (heads, kv_heads), head_dim)
        into_attention: list[Stage] = [
            Project(
                "residual",
                self._norm(block, decoder.attention_norm),
                tuple(
                    linear_of(layer, projected, column=at)
                    for layer, at in zip(qkv, columns, strict=True)
                ),
            ),
            *whole,
            Attend(
                projected,
                heads,
                kv_heads,
                head_dim,
                q_norm,
                k_norm,
                self._rotary(block, attention),
                self._options(block, attention, head_dim),
                attended,
                decoder.qkv_by_head,
            ),
        ]
        out_of_attention = self._add(block, attended, out, decoder.after_attention)
        into_mlp, out_of_mlp = self._mlp(block)
        stages = [*into_attention, *out_of_attention, *into_mlp, *out_of_mlp]
        if self._parallel():
            stages = [*into_attention, *into_mlp, *out_of_attention, *out_of_mlp]
        self._check_widths(stages)
        return stages

    def _check_widths(self, stages: list[Stage]) -> None:
        projects = [stage for stage in stages if isinstance(stage, Project)]
        for source, linear in ((stage.source, x) for stage in projects for x in stage.linears):
            shape = [linear.end - linear.begin, linear.layer.in_features]
            before, after = self._widths[source], self._widths[linear.out]
            if shape[1] != before or linear.column + shape[0] > after:
                raise SqCpuError(
                    f"a linear {shape} does not fit between {source} of {before} and "
                    f"{linear.out} of {after}"
                )

    def _head_norms(
        self, block: nn.Module, projected: str, heads: tuple[int, int], head_dim: int
    ) -> tuple[tuple[Norm | None, Norm | None], list[Stage]]:
        """Return the norms of q and k: over each head, or stages where they are over whole rows."""
        decoder = self._decoder
        norms = [self._norm(block, path) for path in (decoder.q_norm, decoder.k_norm)]
        whole: list[Stage] = []
        for index, column in enumerate((0, heads[0] * head_dim)):
            norm = norms[index]
            if norm is not None and len(norm.weight) != head_dim:
                if decoder.qkv_by_head or len(norm.weight) != heads[index] * head_dim:
                    raise SqCpuError(f"a norm of {len(norm.weight)} channels of q or k")
                whole.append(Normalize(projected, column, norm))
                norms[index] = None
        return (norms[0], norms[1]), whole

    def _options(self, block: nn.Module, attention: nn.Module, head_dim: int) -> AttentionOptions:
        decoder, given = self._decoder, self._seen.options.get(attention, {})
        scale = given.get("scaling")
        named = None if decoder.scale is None else float(find(block, decoder.scale))
        if decoder.own_attention or scale is None:
            scale = head_dim**-0.5 if named is None else named
        elif named is not None:
            scale *= named
        slopes = self._seen.biases.get(attention)
        if slopes is not None:
            slopes = slopes.flatten(0, -2)
            slopes = slopes[:, 1] - slopes[:, 0]
        return AttentionOptions(
            scale=float(scale),
            window=given.get("sliding_window") or 0,
            softcap=given.get("softcap") or 0.0,
            slopes=_floats(slopes),
            sinks=_floats(given.get("s_aux")),
        )

    def _mlp(self, block: nn.Module) -> tuple[list[Stage], list[Stage]]:
        """Return what the MLP computes, and what adds it to the residual."""
        decoder, mixture = self._decoder, self._decoder.mixture
        norm = self._norm(block, decoder.mlp_norm)
        if norm is None and self._parallel():
            norm = self._norm(block, decoder.attention_norm)
        if mixture is not None and find(block, mixture.experts, optional=True) is not None:
            return self._mixture(block, norm, mixture)
        down = layer_at(block, decoder.down)
        hidden = self._buffer("hidden", down.in_features)
        into = Project("residual", norm, self._activated(block, decoder.gate_up, hidden))
        return [into], self._add(block, hidden, down, decoder.after_mlp)

    def _activated(
        self, block: nn.Module, paths: tuple[str, ...], hidden: str
    ) -> tuple[Linear, ...]:
        decoder = self._decoder
        name = getattr(self._base.config, decoder.activation, decoder.activation)
        if name not in _ACTIVATIONS:
            raise SqCpuError(f"its activation function is {name!r}")
        activation = _ACTIVATIONS[name]
        if not decoder.gated:
            (path,) = paths
            return (linear_of(layer_at(block, path), hidden, activation=activation),)
        raised = self._buffer(f"{hidden} raised", self._widths[hidden])
        (gate, gate_rows), (up, up_rows) = gate_and_up(block, paths)
        return (
            linear_of(up, raised, rows=up_rows),
            linear_of(gate, hidden, rows=gate_rows, activation=activation, other=raised),
        )

    def _mixture(
        self, block: nn.Module, norm: Norm | None, mixture: Mixture
    ) -> tuple[list[Stage], list[Stage]]:
        """Return the stages of each expert, for the tokens that have it, and of one that all have.

        Their sum is in a buffer of its own: the experts read the residual as it was.
        """
        experts, router = find(block, mixture.experts), find(block, mixture.router)
        if experts not in self._seen.choices or is_altered(router):
            raise SqCpuError(f"{mixture.experts} are not called as transformers calls them")
        width = self._widths["residual"]
        mixed, apart = self._buffer("mixed", width), self._buffer("apart", width)
        weight = router.weight.detach()
        stages: list[Stage] = [Route("residual", norm, weight, *self._seen.choices[experts], mixed)]
        for index in range(len(experts)):
            at = f"{mixture.experts}.{index}"
            down = layer_at(block, f"{at}.{mixture.down}")
            hidden = self._buffer("expert", down.in_features)
            gate_up = self._activated(
                block, tuple(f"{at}.{path}" for path in mixture.gate_up), hidden
            )
            stages += [
                Project("residual", norm, gate_up, list=index, gather=True),
                Project(hidden, None, (linear_of(down, apart),), list=index),
                Add(apart, mixed, list=index),
            ]
        if mixture.shared_down and find(block, mixture.shared_down, optional=True) is not None:
            down = layer_at(block, mixture.shared_down)
            hidden = self._buffer("shared expert", down.in_features)
            gate = self._buffer("shared gate", 1)
            linears = self._activated(block, mixture.shared_gate_up, hidden)
            linears = (*linears, linear_of(layer_at(block, mixture.shared_gate), gate))
            stages += [
                Project("residual", norm, linears),
                Project(hidden, None, (linear_of(down, apart),)),
                Add(apart, mixed, gate=gate),
            ]
        return stages, [Add(mixed, "residual")]

    def _parallel(self) -> bool:
        parallel = self._decoder.parallel
        return bool(getattr(self._base.config, parallel) if isinstance(parallel, str) else parallel)

    def _add(self, block: nn.Module, source: str, layer: Layer, norm: str | None) -> list[Stage]:
        """Add a linear to the residual, or the norm of it."""
        if norm is None:
            multiplier = getattr(self._base.config, self._decoder.residual_multiplier, 1.0)
            linear = linear_of(layer, "residual", accumulate=True, multiplier=float(multiplier))
            return [Project(source, None, (linear,))]
        apart = self._buffer("apart", layer.out_features)
        after = self._norm(block, norm)
        if after is None:
            raise SqCpuError(f"a block has no {norm}")
        return [Project(source, None, (linear_of(layer, apart),)), Merge(apart, after, "residual")]

    def _norm(self, block: nn.Module, paths: str | tuple[str, ...] | None) -> Norm | None:
        """Return the norm at the first of some paths that there is; None: at none of them."""
        norm = path = None
        for path in (paths,) if isinstance(paths, str) else paths or ():
            norm = find(block, path, optional=True)
            if norm is not None:
                break
        if norm is None:
            return None
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if not isinstance(eps, float):
            raise SqCpuError(f"{path} is a {type(norm).__name__}, which has no eps")
        weight = norm.weight
        if weight is None:  # OPT's without parameters
            weight = torch.ones(norm.normalized_shape, dtype=torch.float32, device="cpu")
        return Norm(
            "layer" if isinstance(norm, nn.LayerNorm) else "rms",
            weight.detach().float() + self._norm_offset,
            _floats(getattr(norm, "bias", None)),
            eps,
        )

    def _rotary(self, block: nn.Module, attention: nn.Module) -> Rotary | None:
        used = find(block, self._decoder.uses_rotary, optional=True)
        if decoder_table := self._decoder.rotary_table:
            return self._stored_rotary(find(block, decoder_table))
        if attention not in self._seen.rotaries or (used is not None and not used):
            return None
        if attention in self._seen.biases:
            return None  # ALiBi is in the place of positions
        extra = self._seen.rotaries[attention]
        module = find(self._base, self._decoder.rotary)
        kinds = _rope_types(module)
        if kinds & {"dynamic", "longrope"}:
            raise SqCpuError(f"rotary tables of type {kinds} depend on the sequence's length")

        @torch.no_grad()
        def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = module(torch.zeros(1, dtype=torch.float32), positions, *extra)
            return cos, sin

        return self._rotaries.setdefault(extra, Rotary(tables, self._decoder.interleaved))

    def _stored_rotary(self, stored: Tensor) -> Rotary:
        """Return the rotary embedding of a table [positions, rotated]: sines, then cosines."""

        def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
            sin, cos = stored[positions].chunk(2, dim=-1)
            return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

        rotary = Rotary(tables, self._decoder.interleaved, len(stored))
        for known in self._rotaries.values():
            if known.positions == len(stored) and torch.equal(
                known.table(len(stored)), rotary.table(len(stored))
            ):
                return known
        return self._rotaries.setdefault((id(stored),), rotary)


def _rope_types(rotary: Any) -> set[str]:
    kinds = getattr(rotary, "rope_type", "default")
    return set(kinds.values()) if isinstance(kinds, Mapping) else {kinds}


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
