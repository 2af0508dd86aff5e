"""A request on its way through a scheduler."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from sq_cpu.inference.requests import Finish, Request
from sq_cpu.inference.sampling import Penalties
from sq_cpu.kernels.paged_attention import PAGE_TOKENS

__all__ = ["Continuation"]


class Continuation:
    """A request on its way."""

    def __init__(
        self, number: int, request: Request, prompt: list[int], stops: Sequence[int]
    ) -> None:
        self.number = number
        self.request = request
        self.ids = prompt
        self.prompt_length = len(prompt)
        self.stream = request.sampling.stream(prompt, request.stream)
        self.stops = frozenset(stops)
        self.penalties = Penalties(request.sampling, prompt) if request.sampling.edits else None
        self.table: list[int] = []
        self.failure: str | None = None
        self.computed = 0
        """Tokens whose keys and values are in the pages."""
        self.keys: list[bytes] = []
        """Of its full pages."""

    @property
    def pending(self) -> int:
        """Return how many tokens are to be computed before the next is known."""
        return len(self.ids) - self.computed

    @property
    def generated(self) -> int:
        """Return how many tokens it got."""
        return len(self.ids) - self.prompt_length

    def finish(self, token: int) -> Finish | None:
        """Return why a next token, negative where there is none, is the last."""
        if token < 0:
            return "error"
        if token in self.stops:
            return "stop"
        return "length" if self.generated + 1 == self.request.max_new_tokens else None

    def begin_again(self) -> None:
        """Forget what was computed, and what may be half done."""
        self.table, self.computed, self.keys = [], 0, []
        if self.penalties is not None:
            prompt, generated = self.ids[: self.prompt_length], self.ids[self.prompt_length :]
            self.penalties = Penalties(self.request.sampling, prompt, generated)

    def mask(self, words: int) -> Tensor | None:
        """Return the bits of tokens that may come next; none where its `allowed` fails."""
        if self.request.allowed is None:
            return None
        try:
            mask = self.request.allowed()
            if mask.dtype == torch.int32 and mask.shape == (words,):
                return mask
            self.failure = f"allowed() gives {mask.dtype} {[*mask.shape]}, not int32 [{words}]"
        except Exception as error:  # of the one who asks; the others go on
            self.failure = f"allowed() raises {type(error).__name__}: {error}"
        return torch.zeros(words, dtype=torch.int32)

    def key(self, page: int) -> bytes:
        """Return what tells all tokens up to the end of a page."""
        while len(self.keys) <= page:
            begin = len(self.keys) * PAGE_TOKENS
            ids = self.ids[begin : begin + PAGE_TOKENS]
            before = self.keys[-1] if self.keys else b""
            self.keys.append(hashlib.sha256(before + struct.pack(f"{len(ids)}q", *ids)).digest())
        return self.keys[page]
