"""What a worker's process runs: a model that takes prompts and continues them greedily.

A module of a runtime is imported where it is used: a peer's process has no torch in its memory.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

_MODULES = {  # runtime -> module: class
    "transformers": "torch_runtimes:Transformers",
    "compile": "torch_runtimes:Compiled",
    "int8": "torch_runtimes:Int8",
    "fused": "torch_runtimes:Fused",
    "generate": "torch_runtimes:Generate",
    "read": "torch_runtimes:Read",
    "llama.cpp": "peer_runtimes:LlamaCpp",
    "openvino": "peer_runtimes:OpenVino",
    "ipex": "ipex_runtimes:Ipex",
}


class Runtime(ABC):
    """A loaded model."""

    version: str
    """What it is, and of what build."""
    weight_bytes: int | None = None
    """That one step of decoding reads at least, where it is known."""
    seconds: float | None = None
    """Of the last `decode`, where the runtime alone can tell them."""

    @abstractmethod
    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Forget all sequences, begin these, of one length; return the next token of each."""

    @abstractmethod
    def decode(self, steps: int) -> list[list[int]]:
        """Continue all by so many tokens; return those of each step."""

    def write_logits(self, path: Path) -> bool:
        """Write the last logits [sequences, vocabulary] as .npy; False where there are none."""
        del path
        return False

    def score(self, prompt: list[int], tokens: list[int]) -> float:
        """Return the mean logarithm of the probability of tokens after a prompt."""
        raise NotImplementedError(f"{type(self).__name__} does not score")


def make(settings: dict[str, Any]) -> Runtime:
    """Make the runtime that the settings name; the others are its constructor's."""
    module, name = _MODULES[settings["runtime"]].split(":")
    made = getattr(importlib.import_module(module), name)(
        **{key: value for key, value in settings.items() if key != "runtime"}
    )
    assert isinstance(made, Runtime)
    return made
