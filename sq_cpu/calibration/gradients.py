"""What an error in a linear's output costs the model: gradients of a sampled loss.

Let g be the gradient of -log p(y | x) with respect to a linear's output, with y drawn from the
model's own prediction. A small error d of that output moves the prediction by a KL divergence of
E[(g . d)^2] / 2 (the Fisher information; Amari 1998). So the errors of all linears have one unit,
nats, and their sum is what the model loses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

from sq_cpu.errors import SqCpuError
from sq_cpu.models.calls import frozen
from sq_cpu.models.hooks import hooked
from sq_cpu.models.padding import Padding

__all__ = ["differentiating", "sampled_loss"]


def sampled_loss(outputs: Any, padding: Padding, generator: torch.Generator) -> Tensor:
    """Return -log p(y | x), summed over all predictions, of y drawn from the prediction itself.

    Where the model gives `logits` [..., classes], y is drawn from their softmax. All other float
    outputs count as means of Gaussians of variance 1. Positions that are padding do not count.
    Raises `SqCpuError` when no output depends on a linear.
    """

    def rows_of(output: Tensor) -> Tensor:
        kept = padding.kept(output)
        rows = output.float().reshape(-1, output.shape[-1] if output.dim() else 1)
        return rows if kept is None else rows[kept]

    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor) and logits.dim() >= 2 and logits.requires_grad:
        rows = rows_of(logits)
        with torch.no_grad():
            labels = torch.multinomial(rows.softmax(dim=-1), 1, generator=generator)[:, 0]
        return cross_entropy(rows, labels, reduction="sum")
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    terms = []
    for rows in (rows_of(leaf) for leaf in leaves if leaf.requires_grad):
        drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float32, device="cpu")
        terms.append((rows * drawn).sum())
    if not terms:
        raise SqCpuError(
            "the model's outputs have no gradient (its forward may disable them): calibrate "
            "with gradient_rows=0"
        )
    return torch.stack(terms).sum()


@contextmanager
def differentiating(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    taker: Callable[[str], Callable[[Tensor], None]],
) -> Iterator[None]:
    """Run a block in which calls of the model have a graph from the first linears on.

    Right after a linear ran, taker(name) returns the function that takes its output's gradient.
    Parameters get no gradients.
    """

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        if x.requires_grad:
            return None
        x = x.detach().requires_grad_()
        return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, "input": x})

    def after(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, _kwargs: Any, y: Tensor) -> Tensor | None:
            if not y.requires_grad:  # a part of the model that runs without gradients
                return None
            # A copy: the model may change y in place, and the hook would get that one's gradient.
            y = y.clone()
            y.register_hook(taker(name))  # type: ignore[no-untyped-call]
            return y

        return hook

    inputs = [(linear, before) for linear in linears.values()]
    outputs = [(linear, after(name)) for name, linear in linears.items()]
    with frozen(model), hooked(before=inputs, after=outputs), torch.enable_grad():
        yield
