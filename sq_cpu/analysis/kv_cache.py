"""What an int8 cache of keys and values costs a model, and which layers should have bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.attach import attend_in_floats, attention_restored, use_int8_attention
from sq_cpu.inference.fusing import fused_of
from sq_cpu.inference.kv_kinds import KvChoice, choose_kv, kv_kinds, layer_count
from sq_cpu.kernels.paged_attention import KvKind
from sq_cpu.models.calls import Batch, Example, evaluating, model_inputs
from sq_cpu.models.checks import check_is_module
from sq_cpu.models.hf_private import is_transformers
from sq_cpu.models.padding import Padding, padding_of
from sq_cpu.progress import track

__all__ = ["KvReport", "measure_kv"]

_Rows = Tensor | slice
"""Which tokens of a call: bool [tokens], or all."""


@dataclass(frozen=True)
class KvReport:
    """Divergences (KL) of a token's distribution to that with attention in floats, in nats."""

    int8: float
    """The median over the tokens, with int8 in all layers."""
    by_layer: Mapping[int, float]
    """The mean over the tokens, with int8 in this layer alone and bf16 in the others."""
    kv: Mapping[int, KvKind]
    """The layers that `use_int8_attention` and `fuse` should be given, {layer: "bf16"}."""
    chosen: float
    """The median with those in bf16."""

    def to_dict(self) -> dict[str, Any]:
        """Return what `json.dumps` takes."""
        return {
            "int8": self.int8,
            "by_layer": {str(layer): kl for layer, kl in self.by_layer.items()},
            "kv": {str(layer): kind for layer, kind in self.kv.items()},
            "chosen": self.chosen,
        }


def measure_kv(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    most: float = 1e-3,
    progress: bool | None = None,
) -> KvReport:
    """Measure an int8 cache layer by layer, and choose bf16 for those that spoil it.

    The layer whose int8 costs most goes to bf16 first, until the median divergence is at most
    `most`. Measure the float model before it is quantized: int8 linears turn any difference, that
    of a bf16 cache too, into other codes of their inputs, and what the cache costs does not show.
    The model keeps what its config said of the cache.

    Parameters
    ----------
    model : a causal language model of transformers
    batches : calls as for `calibrate`; the logits of all are held, tokens * vocabulary * 4 bytes.
        Padding is left out
    most : the median divergence in nats that is good enough
    progress : whether to show a bar; None: on a terminal

    Raises
    ------
    SqCpuError
        For what `use_int8_attention` refuses, a fused model, one without logits, and `most` below
        0.
    """
    check_is_module(model)
    if not isinstance(most, int | float) or not most >= 0:
        raise SqCpuError(f"most is {most!r}; a divergence is at least 0")
    if is_transformers(model) and fused_of(model) is not None:
        raise SqCpuError("the model is fused: sq_cpu.fuse(model, enabled=False) first")
    calls = list(model_inputs(model, batches, "the cache's cost", "", False))
    with attention_restored(model), evaluating(model):
        use_int8_attention(model)  # refuses what has no such attention
        config: Any = model.config
        layers = layer_count(config)
        attend_in_floats(model)
        references = [_kept(model, call, padding_of(model, *call)) for call in calls]
        if not any(len(reference) for reference, _ in references):
            raise SqCpuError("the batches hold padding alone: their masks keep no token")
        use_int8_attention(model)
        before = dict(enumerate(kv_kinds(config, layers)))

        def divergence(kv: KvChoice) -> Tensor:
            choose_kv(config, kv)
            found = [
                _divergence(reference, _log_probabilities(_logits(model, call), rows))
                for (reference, rows), call in zip(references, calls, strict=True)
            ]
            return torch.cat(found)

        try:
            return _choose(divergence, layers, most, progress)
        finally:
            choose_kv(config, before)


def _choose(
    divergence: Callable[[KvChoice], Tensor], layers: int, most: float, progress: bool | None
) -> KvReport:
    int8 = float(divergence("int8").median())
    by_layer = {}
    for layer in track(range(layers), "measuring the cache", progress):
        others: dict[int, KvKind] = {i: "bf16" for i in range(layers) if i != layer}
        by_layer[layer] = float(divergence(others).mean())
    chosen, kv = int8, dict[int, KvKind]()
    for layer in sorted(by_layer, key=by_layer.__getitem__, reverse=True):
        if chosen <= most:
            break
        kv[layer] = "bf16"
        chosen = float(divergence(kv).median())
    return KvReport(int8, by_layer, dict(sorted(kv.items())), chosen)


def _divergence(reference: Tensor, other: Tensor) -> Tensor:
    """Return KL(reference || other) of log probabilities [tokens, vocabulary], by token."""
    p = reference.exp()
    # Where p is 0 both logarithms may be -inf: a token that the model forbids.
    found = torch.where(p == 0, 0.0, p * (reference - other)).sum(dim=1)
    if found.isnan().any():
        raise SqCpuError("the model's logits have NaN or Inf: it overflows on these batches")
    return found


def _logits(model: Any, example: Example) -> Tensor:
    args, kwargs = example
    logits = getattr(model(*args, **kwargs), "logits", None)
    if not isinstance(logits, Tensor):
        raise SqCpuError(f"{type(model).__name__} gives no logits: measure a causal language model")
    return logits


def _kept(model: nn.Module, example: Example, padding: Padding) -> tuple[Tensor, _Rows]:
    """Return the log probabilities of a call's tokens that are no padding, and which these are."""
    with padding.tracing():
        logits = _logits(model, example)
        kept = padding.kept(logits)
    rows = slice(None) if kept is None else kept
    return _log_probabilities(logits, rows), rows


def _log_probabilities(logits: Tensor, rows: _Rows) -> Tensor:
    """Return the log probabilities of some of a call's tokens, fp32 [tokens, vocabulary]."""
    return logits.flatten(0, -2)[rows].float().log_softmax(dim=1)
