"""vLLM in a process of its own, and what sq_cpu answers itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sq_cpu import Scheme

ENGINE = Path(__file__).with_name("engine.py")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function goes to where the model is
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
}
_STATIC = Scheme(activations="static", dynamic_fallback=False)
WAYS: dict[str, tuple[Scheme, dict[str, Any]]] = {
    "O3": (Scheme.of("O3"), {}),
    "O1": (Scheme.of("O1"), {}),
    "compressed static": (_STATIC, {"hadamard": 0}),
    "compressed per token": (Scheme(symmetric=False), {"hadamard": 0}),
}
"""How the real model is quantized; "compressed": in the format compressed-tensors."""


@dataclass(frozen=True)
class Answer:
    """What vLLM answered."""

    prompts: list[list[int]]
    tokens: int
    alone: list[list[int]]
    together: list[list[int]]
    layers: list[dict[str, Any]]
    """By rank, what `held_against_ours` found."""
    log: str


def ask_vllm(
    folder: Path,
    prompts: list[list[int]],
    scratch: Path,
    *,
    tokens: int = 24,
    compare: bool = False,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> Answer:
    """Have vLLM continue prompts; an engine that ends without an answer raises with its log."""
    request = {
        "folder": str(folder),
        "prompts": prompts,
        "tokens": tokens,
        "compare": compare,
        "options": options,
    }
    asked, answered = scratch / "request.json", scratch / "result.json"
    asked.write_text(json.dumps(request))
    answered.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, str(ENGINE), str(asked), str(answered)],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT | (environment or {}),
        timeout=550,
    )
    log = done.stdout + done.stderr
    if not answered.exists():
        raise RuntimeError(log)
    found = json.loads(answered.read_text())
    return Answer(prompts, tokens, found["alone"], found["together"], found.get("layers", []), log)


def our_text(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """Return the greedy continuation by sq_cpu, end of text or not."""
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=1 << 30,
        pad_token_id=0,
    )
    found: list[int] = made[0, len(prompt) :].tolist()
    return found
