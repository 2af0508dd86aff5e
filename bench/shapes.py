"""The linears of real models: what a benchmark of the linear op runs over."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A linear of a decoder block: y [M, n] = x [M, k] @ weight [n, k] transposed."""

    linear: str
    n: int
    k: int


SHAPES: dict[str, tuple[Shape, ...]] = {
    "SmolLM2-135M": (
        Shape("q,o", 576, 576),
        Shape("k,v", 192, 576),
        Shape("gate,up", 1536, 576),
        Shape("down", 576, 1536),
    ),
    "Llama-2-7B": (
        Shape("q,k,v,o", 4096, 4096),
        Shape("gate,up", 11008, 4096),
        Shape("down", 4096, 11008),
    ),
}

ROWS = (1, 4, 16, 64, 256)
"""M: 1 is decode, 256 a short prompt; 1024 on request."""

QUICK: dict[str, tuple[Shape, ...]] = {
    "SmolLM2-135M": SHAPES["SmolLM2-135M"][2:3],
    "Llama-2-7B": SHAPES["Llama-2-7B"][:1],
}
