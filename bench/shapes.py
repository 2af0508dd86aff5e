"""The linears of real models: what a benchmark of the linear op runs over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sq_cpu.errors import SqCpuError

MODELS: dict[str, dict[str, tuple[int, int]]] = {  # model -> linears of a decoder block -> (N, K)
    "SmolLM2-135M": {
        "q,o": (576, 576),
        "k,v": (192, 576),
        "gate,up": (1536, 576),
        "down": (576, 1536),
    },
    "Llama-2-7B": {
        "q,k,v,o": (4096, 4096),
        "gate,up": (11008, 4096),
        "down": (4096, 11008),
    },
    "Llama-3-8B": {
        "q,o": (4096, 4096),
        "k,v": (1024, 4096),
        "gate,up": (14336, 4096),
        "down": (4096, 14336),
    },
    "OPT-6.7B": {
        "q,k,v,o": (4096, 4096),
        "fc1": (16384, 4096),
        "fc2": (4096, 16384),
    },
    "Qwen2.5-7B": {
        "q,o": (3584, 3584),
        "k,v": (512, 3584),
        "gate,up": (18944, 3584),
        "down": (3584, 18944),
    },
}

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
"""M: 1 is decode, 2 to 32 small batches, the rest prompts."""


class Shape(NamedTuple):
    """y [M, n] = x [M, k] @ weight [n, k] transposed."""

    n: int
    k: int

    def layers(self) -> dict[str, str]:
        """Return the linears of this shape by model."""
        found = {
            model: ";".join(name for name, shape in linears.items() if shape == self)
            for model, linears in MODELS.items()
        }
        return {model: names for model, names in found.items() if names}


def shapes_of(models: Iterable[str]) -> list[Shape]:
    """Return every shape of these models once."""
    unknown = [model for model in models if model not in MODELS]
    if unknown:
        raise SqCpuError(f"no shapes of {', '.join(unknown)}; known: {', '.join(MODELS)}")
    return list(dict.fromkeys(Shape(*pair) for name in models for pair in MODELS[name].values()))


QUICK = (Shape(1536, 576), Shape(4096, 4096))
QUICK_ROWS = (1, 4, 16, 64, 256)
