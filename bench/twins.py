"""What plain torch makes of the linears that were quantized, to compare the int8 model with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import sq_cpu
from sq_cpu.kernels.hadamard import fwht64


@dataclass
class Made:
    """What a linear was when it was quantized."""

    weight: Tensor
    bias: Tensor | None
    scheme: sq_cpu.Scheme
    range: tuple[float, float] | None
    smoothing: Tensor | None
    hadamard: int = 0

    def turned(self, x: Tensor) -> Tensor:
        """Return X / s or W s as the layer rotates it; twice gives back what was."""
        return fwht64(x) if self.hadamard else x


class FloatTwin(nn.Linear):
    """The folded, not quantized linear."""

    def __init__(self, made: Made) -> None:
        super().__init__(made.weight.shape[1], made.weight.shape[0], bias=made.bias is not None)
        self.made = made
        self.s = torch.ones(self.in_features) if made.smoothing is None else made.smoothing
        self.effective = self.prepared(made.turned(made.weight.float() * self.s))
        weight = made.turned(self.effective)[:, : self.in_features] / self.s
        self.weight = nn.Parameter(weight, requires_grad=False)
        if made.bias is not None:
            self.bias = nn.Parameter(made.bias, requires_grad=False)

    def prepared(self, weight: Tensor) -> Tensor:
        """Return W s as it multiplies, [out_features, in_features]."""
        return weight

    def quantized(self, x: Tensor) -> Tensor:
        """Return X / s as it is multiplied."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x, of its dtype."""
        bias = None if self.bias is None else self.bias.float()
        coded = self.quantized(self.made.turned(x.float() / self.s))
        return F.linear(coded, self.effective, bias).to(x.dtype)


class FakeTwin(FloatTwin):
    """The linear under torch's own fake quantization, with scales found here."""

    def prepared(self, weight: Tensor) -> Tensor:
        """Return Q(W s), a scale a row."""
        scale = weight.abs().amax(dim=1).clamp_min(1e-30) / 127
        zero = torch.zeros(len(weight), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)

    def quantized(self, x: Tensor) -> Tensor:
        """Return Q(X / s): static, but for rows that do not fit, or a scale a row."""
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return x
        absmax = rows.abs().amax(dim=1)
        zero = torch.zeros(len(rows), dtype=torch.int32)
        own = absmax.clamp_min(1e-30) / 127
        fake = torch.fake_quantize_per_channel_affine(rows, own, zero, 0, -127, 127)
        if self.made.range is not None:
            scale = max(1e-30, -self.made.range[0], self.made.range[1]) / 127
            static = torch.fake_quantize_per_tensor_affine(rows, scale, 0, -127, 127)
            largest = torch.round(absmax / scale)
            fits = (largest <= 127) & ((largest >= 16) | (absmax == 0))
            fits |= not self.made.scheme.dynamic_fallback
            fake = torch.where(fits[:, None], static, fake)
        return fake.reshape(x.shape)


class NudgedTwin(FakeTwin):
    """A `FakeTwin` whose weight and input are off by as much as fp32 sums round, drawn by `seed`.

    A value between two codes takes the other one. So do those that int8 computes by another order
    of operations; where the model then decides by a threshold, its output jumps.
    """

    def __init__(self, made: Made, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        super().__init__(made)

    def prepared(self, weight: Tensor) -> Tensor:
        """Return Q(W s) of a nudged weight."""
        return super().prepared(self._nudged(weight))

    def quantized(self, x: Tensor) -> Tensor:
        """Return Q(X / s) of a nudged input."""
        return super().quantized(self._nudged(x))

    def _nudged(self, x: Tensor) -> Tensor:
        # Rounding of a few hundred sums, each to 2^-24: 1e-6.
        return x * (1 + 2**-20 * torch.randn(x.shape, generator=self.generator))


class Reference(nn.Linear):
    """A quantized linear in plain torch, by the definition of its result."""

    def __init__(self, layer: sq_cpu.QuantLinear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        weight = layer.weight_int8().float() * layer.weight_scale[:, None]
        if layer.hadamard:
            weight = fwht64(weight)[:, : layer.in_features]
        self.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias, requires_grad=False)
        self.layer = [layer]  # no child: the model's own code is not to find it

    def forward(self, x: Tensor) -> Tensor:
        """Return what `QuantLinear.reference` does."""
        return self.layer[0].reference(x)


@contextmanager
def recording() -> Iterator[dict[int, Made]]:
    """Record, of each layer that is made within, the linear that it is made of."""
    found: dict[int, Made] = {}
    make = sq_cpu.QuantLinear.from_float.__func__  # type: ignore[attr-defined]

    def from_float(
        cls: Any,
        linear: nn.Linear,
        scheme: Any,
        input_range: Any = None,
        *,
        smoothing: Any = None,
        hadamard: int = 0,
        **more: Any,
    ) -> Any:
        bias = None if linear.bias is None else linear.bias.detach().clone()
        smoothing = None if smoothing is None else smoothing.detach().clone()
        weight = linear.weight.detach().clone()
        made = Made(weight, bias, scheme, input_range, smoothing, hadamard)
        more |= {"smoothing": smoothing, "hadamard": hadamard}
        layer = make(cls, linear, scheme, input_range, **more)
        found[id(layer)] = made
        return layer

    with mock.patch.object(sq_cpu.QuantLinear, "from_float", classmethod(from_float)):
        yield found


def twin(model: Any, record: Mapping[int, Made], kind: Callable[[Any], nn.Linear]) -> Any:
    """Return a copy of a quantized model with `kind` in the place of each int8 linear."""
    originals = dict(model.named_modules(remove_duplicate=False))
    other = copy.deepcopy(model)
    for name, layer in originals.items():
        if isinstance(layer, sq_cpu.QuantLinear):
            parent, _, key = name.rpartition(".")
            new = kind(layer if kind is Reference else record[id(layer)])
            setattr(other.get_submodule(parent), key, new.eval())
    return other


def steps_from_fake(
    model: nn.Module, made: Mapping[int, Made], run: Callable[[], object]
) -> dict[str, float]:
    """Return by how many steps each int8 linear differs from torch's fake quantization.

    Both get the very input that the int8 model gives to the linear.
    """
    steps: dict[str, float] = {}
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, sq_cpu.QuantLinear):
            fake = FakeTwin(made[id(layer)])

            def compare(
                _: nn.Module, args: Any, kwargs: Any, y: Any, name: str = name, fake: Any = fake
            ) -> None:
                (x,) = [*args, *kwargs.values()]
                if x.numel():
                    coded = fake.made.turned(x.float() / fake.s)
                    largest = coded.abs().max() * fake.effective.abs().max()
                    step = float(largest) / 127 + 1e-5 * float(y.abs().max()) + 1e-30
                    count = float((fake(x) - y).abs().max()) / step
                    steps[name] = max(steps.get(name, 0.0), count)

            handles.append(layer.register_forward_hook(compare, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return steps
