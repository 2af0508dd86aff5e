"""Which tokens carry massive activations: what a prefix is made of (PrefixQuant, 2410.05265)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.requests import integers
from sq_cpu.models.calls import called, evaluating
from sq_cpu.models.checks import check_model
from sq_cpu.models.hooks import watching_inputs
from sq_cpu.models.linears import linearized, quantizable_linears
from sq_cpu.parsing import check_kind, check_whole

__all__ = ["outlier_tokens"]

_TIMES = 64  # a row that reaches so many times farther than the median one is massive


def outlier_tokens(
    model: nn.Module, windows: Iterable[Tensor], front: Sequence[int] = (), *, most: int = 2
) -> list[int]:
    """Return the ids whose rows reach farthest, the most frequent first, for `lead_with`.

    A row of a linear's input is massive where its greatest value exceeds 64 times that of the
    linear's median row. Once the first such tokens stand in a prefix, others often carry none: so
    ask again with these in front, and keep what lowers the perplexity.

    Parameters
    ----------
    model : in float
    windows : ids, int64 [1, tokens] each, that begin with `front`
    front : ids that the windows begin with; they are not counted, and come first in the result
    most : how many beside these

    Raises
    ------
    SqCpuError
        For windows of another shape, or that do not begin so, and a model whose forward fails.
    """
    check_model(model)
    check_kind(Iterable, "windows of ids", windows=windows)
    check_whole(0, most=most)
    front = integers(front, "front")
    reaches: dict[str, list[Tensor]] = {}
    ids: list[int] = []

    def observe(name: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float().abs().amax(dim=1)
        if len(rows) == length:  # not of an expert, which gets some of them
            reaches.setdefault(name, []).append(rows)

    with linearized(model):
        linears = quantizable_linears(model)
        with evaluating(model), watching_inputs(linears, "input", observe):
            for window in windows:
                check_kind(Tensor, "a tensor of ids", window=window)
                fits = window.dim() == 2 and len(window) == 1
                if not fits or window[0, : len(front)].tolist() != front:
                    raise SqCpuError(
                        f"a window is {[*window.shape]}; it is [1, tokens] and begins with {front}"
                    )
                length = window.shape[1]
                ids += window[0].tolist()
                called(model, ((window,), {}), "outlier tokens")
    counts: Counter[int] = Counter()
    massive = torch.zeros(len(ids), dtype=torch.bool)
    for each in reaches.values():
        rows = torch.cat(each)
        if len(rows) == len(ids):
            massive |= rows > _TIMES * rows.median()
    counts.update(ids[place] for place in massive.nonzero().flatten().tolist())
    found = [token for token, _ in counts.most_common() if token not in front]
    return front + found[:most]
