"""Runtimes on torch: transformers in float, and ours. Of sq_cpu only public names are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peak
import torch
import transformers
from runtimes import Runtime
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, StaticCache

import sq_cpu


def linear_bytes(model: nn.Module) -> int:
    """Return the bytes of the linears' weights, the head's among them."""
    total = 0
    for module in model.modules():
        if isinstance(module, sq_cpu.QuantLinear):
            total += module.in_features * module.out_features
        elif isinstance(module, nn.Linear):
            total += module.weight.nbytes
    return total


class Transformers(Runtime):
    """A folder of a causal language model, called as transformers calls it."""

    def __init__(
        self, path: str, threads: int, sequences: int, tokens: int, dtype: str | None = None
    ) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.version = f"torch {torch.__version__}, transformers {transformers.__version__}"
        self._sequences, self._tokens = sequences, tokens
        self.model: Any = self._load(path, dtype)
        self.weight_bytes = linear_bytes(self.model)
        self._logits = torch.empty(0)
        self._cache: Any = None

    def _load(self, path: str, dtype: str | None) -> nn.Module:
        assert dtype is not None
        kind = getattr(torch, dtype)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, local_files_only=True)
        return model.eval().requires_grad_(False)

    def _new_cache(self) -> Any:
        return None

    def _forward(self, ids: Tensor) -> list[int]:
        output = self.model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = output.past_key_values
        self._logits = output.logits[:, -1]
        next_ids: list[int] = self._logits.argmax(-1).tolist()
        self._next = next_ids
        return next_ids

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Compute the prompts as one batch."""
        self._cache = self._new_cache()
        return self._forward(torch.tensor(prompts))

    def decode(self, steps: int) -> list[list[int]]:
        """Take the likeliest token of each step."""
        return [self._forward(torch.tensor(self._next)[:, None]) for _ in range(steps)]

    def write_logits(self, path: Path) -> bool:
        """Write those of the last call."""
        np.save(path, self._logits.float().numpy())
        return True

    def score(self, prompt: list[int], tokens: list[int]) -> float:
        """Compute prompt and tokens at once, without a cache."""
        ids = torch.tensor([prompt + tokens])
        logits = self.model(input_ids=ids, logits_to_keep=len(tokens) + 1).logits[0, :-1]
        chosen = torch.tensor(tokens)[:, None]
        return float(logits.double().log_softmax(-1).gather(1, chosen).mean())


class Compiled(Transformers):
    """The same by torch.compile, over a cache of fixed size, which it asks for."""

    def _load(self, path: str, dtype: str | None) -> nn.Module:
        model = super()._load(path, dtype)
        model.forward = torch.compile(model.forward)
        return model

    def _new_cache(self) -> Any:
        return StaticCache(config=self.model.config, max_cache_len=self._tokens)


class Int8(Transformers):
    """A checkpoint of ours, its linears in int8."""

    def _load(self, path: str, dtype: str | None) -> nn.Module:
        del dtype  # as stored
        self.version += f", sq_cpu {sq_cpu.__version__} ({sq_cpu.isa()['in_use']})"
        return sq_cpu.load(path)


class Fused(Int8):
    """The same as one native call, with int8 attention, through transformers' call."""

    def _load(self, path: str, dtype: str | None) -> nn.Module:
        model = super()._load(path, dtype)
        sq_cpu.fuse(model)
        return model


class Generate(Fused):
    """The same through our scheduler, as `sq_cpu.generate` and the server run it."""

    def __init__(self, path: str, threads: int, sequences: int, tokens: int) -> None:
        super().__init__(path, threads, sequences, tokens)
        page = 64  # tokens
        self._scheduler = sq_cpu.Scheduler(
            self.model, pages=sequences * (tokens // page + 1), sequences=sequences
        )
        self._made: dict[int, list[int]] = {}  # request -> its tokens that were not yet returned

    def _step(self) -> None:
        for token in self._scheduler.step():
            if token.finish == "error":
                raise sq_cpu.SqCpuError(token.error)
            self._made[token.request].append(token.id)

    def _take(self) -> list[int]:
        """Return the next token of each sequence; made ahead, where prompts ended apart."""
        while not all(self._made.values()):
            if not self._scheduler.busy:
                raise sq_cpu.SqCpuError("a sequence has ended: it has no room for more tokens")
            self._step()
        return [made.pop(0) for made in self._made.values()]

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Compute new requests until each has a token; the old ones are cancelled."""
        for number in self._made:
            self._scheduler.cancel(number)
        room = self._tokens - len(prompts[0])
        self._made = {
            self._scheduler.add(sq_cpu.Request(prompt=prompt, max_new_tokens=room)): []
            for prompt in prompts
        }
        first = self._take()
        if self._scheduler.statistics.prefix_hit_tokens:
            raise sq_cpu.SqCpuError("a prompt began as an earlier one, and was not computed")
        return first

    def decode(self, steps: int) -> list[list[int]]:
        """Take the tokens of so many steps."""
        return [self._take() for _ in range(steps)]

    def write_logits(self, path: Path) -> bool:
        """Write nothing: a scheduler keeps its logits."""
        del path
        return False


class Read(Runtime):
    """No model: as many bytes as its weights have in int8 are read, by all threads."""

    def __init__(self, weight_bytes: int, threads: int) -> None:
        self.version = "peak.cc"
        self.weight_bytes, self._threads = weight_bytes, threads

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Read nothing."""
        return [0] * len(prompts)

    def decode(self, steps: int) -> list[list[int]]:
        """Read once, the best of four readings, and tell the time of as many."""
        assert self.weight_bytes is not None
        bandwidth = peak.read_gb_per_s(self._threads, self.weight_bytes)
        self.seconds = steps * self.weight_bytes / bandwidth / 1e9
        return [[0]] * steps
