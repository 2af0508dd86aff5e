"""Many requests through one model: continuous batching (Orca, OSDI 2022).

A step is one forward of a fused model over rows of all running sequences: the next token of each
that is past its prompt, then chunks of prompts. Sequences join and leave between steps. Their keys
and values lie in pages (vLLM, arXiv 2309.06180): sequences that begin alike share the full ones,
and where none is left the youngest sequence gives up its own and computes them again later.

A sequence's tokens do not depend on any of that: a row has the same bits in any batch, however its
sequence was cut into chunks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.continuation import Continuation
from sq_cpu.inference.fusing import FusedDecoder, fused_of
from sq_cpu.inference.pages import PagePool, pages_of, pages_that_fit
from sq_cpu.inference.program import StepRows
from sq_cpu.inference.requests import Request, Statistics, Token, integers
from sq_cpu.inference.sampling import Sampler, likeliest, log_probabilities
from sq_cpu.kernels.paged_attention import PAGE_TOKENS, BatchRows

__all__ = ["Scheduler"]

_ROOM = 4  # pages of a table that a batch's sequences may take before it is made again
_HOOKED = "the model has hooks, which a Scheduler does not call: remove them, or use model.generate"
_CHANGED = "the model has changed since the Scheduler was made: fuse it and make another"


class _Batch:
    """The rows of a step.

    Parameters
    ----------
    parts : sequences, and how many of each one's tokens are computed
    """

    def __init__(self, parts: Sequence[tuple[Continuation, int]]) -> None:
        self.sequences = [sequence for sequence, _ in parts]
        self.counts = [count for _, count in parts]
        ids: list[int] = []
        positions: list[int] = []
        for sequence, count in parts:
            begin = sequence.computed
            ids += sequence.ids[begin : begin + count]
            positions += range(begin, begin + count)
        # Those of which all tokens are known then.
        self.sampled = [each for each, count in parts if count == each.pending]
        first_row = torch.tensor([0, *self.counts]).cumsum(0)
        last_rows = [
            row - 1
            for row, (sequence, count) in zip(first_row[1:].tolist(), parts, strict=True)
            if count == sequence.pending
        ]
        stride = max(len(each.table) for each in self.sequences) + _ROOM
        self.rows = StepRows(
            ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            first_row=first_row,
            length=torch.tensor([each.computed + count for each, count in parts]),
            table=torch.tensor(
                [each.table + [0] * (stride - len(each.table)) for each in self.sequences],
                dtype=torch.int32,
            )[None],
            kept=torch.tensor(last_rows, dtype=torch.int64),
        )
        self.is_prefix = not ids
        """Whether nothing is to be computed: the prompts are the model's prefix and no more."""
        self.only_next = all(count == 1 for count in self.counts) and len(self.sampled) == len(
            parts
        )
        """Whether it can be advanced."""
        requests = [each.request for each in self.sampled]
        self._sampler = Sampler(
            [each.sampling for each in requests], [each.stream for each in self.sampled]
        )
        self._generated = torch.tensor([each.generated for each in self.sampled])
        self._ids = self.rows.ids if self.only_next else torch.empty(len(requests)).long()
        self._edited = any(each.penalties for each in self.sampled)
        self._masked = any(each.allowed for each in requests)
        self.logprobs = any(each.logprobs is not None for each in requests)

    def advance(self) -> bool:
        """Make it the step after, of the same sequences' next tokens; False where it cannot be."""
        stride = self.rows.table.shape[2]
        for i, sequence in enumerate(self.sequences):
            held = len(sequence.table)
            if held > stride:
                return False
            if sequence.computed % PAGE_TOKENS == 0:  # its page is new
                self.rows.table[0, i, held - 1] = sequence.table[-1]
        self.rows.positions += 1
        self.rows.length += 1
        self._generated += 1
        return True

    def choose(self, logits: Tensor) -> list[int]:
        """Return the next token of each of `sampled`, which become the ids of the step after."""
        penalties = [each.penalties for each in self.sampled] if self._edited else None
        words = -(-logits.shape[1] // 32)
        masks = [each.mask(words) for each in self.sampled] if self._masked else None
        return self._sampler.choose(logits, self._generated, self._ids, penalties, masks)


class Scheduler:
    """Requests in, tokens out, step by step. All its calls are of one thread.

    The model stays as it is meanwhile: its keys and values would be those of another.

    Parameters
    ----------
    model : a fused decoder (`fuse`) with a head
    pages : of 64 tokens, that all sequences share; None: as many as `sequences` of the model's
        longest need, or of 4096 tokens where that is less, and as half of the available memory
        holds. Memory is taken as they are written, which in the end all are: those that nobody
        uses keep what later sequences may begin with
    rows : of a step, at most: a longer prompt is computed in several
    sequences : that run at once, at most

    Raises
    ------
    SqCpuError
        For a model that is not fused or has no head, a number that is not positive, and more pages
        than there is memory for.
    """

    def __init__(
        self, model: nn.Module, *, pages: int | None = None, rows: int = 512, sequences: int = 256
    ) -> None:
        fused = fused_of(model)
        if fused is None or not fused.has_head:
            raise SqCpuError("the model is not fused, or has no head: sq_cpu.fuse(model) first")
        fused.refresh()
        config = fused.base.config
        self._positions: float = getattr(config, "max_position_embeddings", None) or math.inf
        for name, value in (("sequences", sequences), ("rows", rows), ("pages", pages)):
            if (type(value) is not int or value < 1) and (name, value) != ("pages", None):
                raise SqCpuError(f"{name} is {value!r}; it is an integer of at least 1")
        if pages is None:
            longest = pages_of(int(min(self._positions, 4096)))
            pages = min(sequences * longest, pages_that_fit(fused.page_bytes))
        self._fused: FusedDecoder = fused
        self._program = fused.program
        self._vocabulary: int = config.vocab_size
        self._rows = rows
        self._most = min(sequences, rows)
        self._pool = PagePool(pages)
        self._caches = [(each, 0) for each in fused.make_pages(pages)]
        self._running: list[Continuation] = []
        self._waiting: deque[Continuation] = deque()
        self._cancelled: set[int] = set()
        self._batch: _Batch | None = None
        """That of the step before."""
        self._made: list[tuple[Continuation, int, Token]] = []
        """Tokens not returned yet, and where among its ids each is."""
        self._next = 0
        self.statistics = Statistics()

    @property
    def running(self) -> int:
        """Return how many requests have begun."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Return how many have not, or were preempted."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether there is a request, or a token of one that a step has not returned yet."""
        return bool(self._running or self._waiting or self._made)

    @property
    def pages(self) -> int:
        """Return how many pages there are."""
        return self._pool.capacity

    @property
    def pages_used(self) -> int:
        """Return how many pages the running requests have."""
        return self._pool.used

    def add(self, request: Request) -> int:
        """Take a request; return its number.

        Raises
        ------
        SqCpuError
            For an empty prompt, ids that are not in the vocabulary, and more tokens than the model
            has positions or the cache pages; and where the model has changed, or has hooks.
        """
        if self._fused.hooked():
            raise SqCpuError(_HOOKED)
        if self._fused.changed() or not self._fused.runs(self._program):
            raise SqCpuError(_CHANGED)
        prompt = integers(request.prompt, "the prompt")
        new = request.max_new_tokens
        if type(new) is not int or new < 1:
            raise SqCpuError(f"max_new_tokens is {new!r}; it is an integer of at least 1")
        if not prompt:
            raise SqCpuError("the prompt is empty")
        top = request.logprobs
        if top is not None and (type(top) is not int or top < 0):
            raise SqCpuError(f"logprobs is {top!r}; it is None or an integer of at least 0")
        stops = integers(request.stop_tokens, "stop_tokens")
        given = [*prompt, *request.sampling.logit_bias]
        if not 0 <= min(given) <= max(given) < self._vocabulary:
            what = "prompt" if given == prompt else "prompt or logit_bias"
            raise SqCpuError(
                f"the {what} has ids from {min(given)} to {max(given)}; the model's are "
                f"0 .. {self._vocabulary - 1}"
            )
        tokens = len(prompt) + new
        if tokens > self._positions:
            raise SqCpuError(
                f"{len(prompt)} tokens of the prompt and {new} new ones exceed the model's "
                f"{self._positions} positions; ask for fewer"
            )
        if pages_of(tokens) > self._pool.capacity:
            raise SqCpuError(
                f"{tokens} tokens need {pages_of(tokens)} pages of the cache, which has "
                f"{self._pool.capacity}"
            )
        self._next += 1
        self._waiting.append(Continuation(self._next, request, prompt, stops))
        self.statistics.prompt_tokens += len(prompt)
        return self._next

    def cancel(self, number: int) -> None:
        """Forget a request before the next step; one that has ended already is no error."""
        self._cancelled.add(number)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Compute one forward, and return the tokens that came of it.

        After an exception, an interrupt among them, all sequences are computed again, and their
        tokens are those that they would have been.

        Raises
        ------
        SqCpuError
            For a model that is fused no more, or was compiled again.
        """
        if not self._fused.runs(self._program):
            raise SqCpuError(_CHANGED)
        try:
            self._compute()
        except BaseException:
            self._begin_again()
            raise
        answered, self._made = [answer for _, _, answer in self._made], []
        return answered

    def _compute(self) -> None:
        """Compute one forward, and add its tokens to `_made`."""
        self._drop_cancelled()
        self._admit()
        batch = self._next_batch()
        if batch is None:
            return
        if batch.is_prefix:
            logits = self._fused.prefix_logits().expand(len(batch.sampled), -1).contiguous()
        else:
            logits = self._fused.logits(batch.rows, self._caches)
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            self._computed(sequence, count)
        raw = log_probabilities(logits) if batch.logprobs else None
        chosen = batch.choose(logits) if batch.sampled else []
        made = []
        for row, (sequence, token) in enumerate(zip(batch.sampled, chosen, strict=True)):
            wanted = sequence.request.logprobs
            logprob: float | None = None
            top: tuple[tuple[int, float], ...] = ()
            if raw is not None and wanted is not None and token >= 0:
                logprob, top = float(raw[row, token]), likeliest(raw[row], wanted)
            answer = Token(
                sequence.number, token, logprob, top, sequence.finish(token), sequence.failure
            )
            made.append((sequence, len(sequence.ids), answer))
        self._made += made  # all or none, whatever is interrupted
        for sequence, _, answer in made:
            if answer.id >= 0:
                sequence.ids.append(answer.id)
                self.statistics.generated_tokens += 1
                if sequence.penalties is not None:
                    sequence.penalties.add(answer.id)
            if answer.finish is not None:
                self._end(sequence)
        self._batch = batch

    def _begin_again(self) -> None:
        """Have all sequences computed again, wherever the step was left."""
        left = {each.number: each for each in (*self._running, *self._waiting)}
        for sequence, end, answer in self._made:
            sequence.ids[end:] = [answer.id]
            if answer.finish is not None:
                left.pop(sequence.number, None)
        self._pool = PagePool(self._pool.capacity)
        self._running, self._batch = [], None
        self._waiting = deque(left[number] for number in sorted(left))
        for sequence in self._waiting:
            sequence.begin_again()

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        for sequence in [each for each in self._running if each.number in self._cancelled]:
            self._end(sequence)
        left = [each for each in self._waiting if each.number not in self._cancelled]
        self._waiting = deque(left)
        self._cancelled.clear()

    def _end(self, sequence: Continuation) -> None:
        self._running.remove(sequence)
        self._pool.release(sequence.table)

    def _admit(self) -> None:
        rows = sum(min(each.pending, self._rows) for each in self._running)
        while self._waiting and len(self._running) < self._most and rows < self._rows:
            sequence = self._waiting[0]
            self._find_prefix(sequence)
            # A page in hand for each that runs: else it would soon be preempted.
            needed = pages_of(len(sequence.ids)) - len(sequence.table) + len(self._running)
            if self._running and needed > self._pool.available:
                self._give_up(sequence)
                return
            self._running.append(sequence)
            self._waiting.popleft()
            rows += sequence.pending
            self.statistics.prefix_query_tokens += len(sequence.ids)
            self.statistics.prefix_hit_tokens += sequence.computed

    def _find_prefix(self, sequence: Continuation) -> None:
        """Take over the pages of what others have computed, but for the last token."""
        for page in range((len(sequence.ids) - 1) // PAGE_TOKENS):
            found = self._pool.find(sequence.key(page))
            if found is None:
                break
            self._pool.share(found)
            sequence.table.append(found)
        sequence.computed = len(sequence.table) * PAGE_TOKENS

    def _give_up(self, sequence: Continuation) -> None:
        self._pool.release(sequence.table)
        sequence.table, sequence.computed = [], 0

    def _next_batch(self) -> _Batch | None:
        last, self._batch = self._batch, None
        if self._fused.prefix is not None and (ready := self._begin_with_prefix()):
            return _Batch([(sequence, 0) for sequence in ready])
        if last is not None and last.sequences == self._running and self._advanced(last):
            return last
        parts: list[tuple[Continuation, int]] = []
        budget = self._rows - sum(each.pending == 1 for each in self._running)
        for sequence in [*self._running]:
            if sequence not in self._running:  # preempted
                continue
            count = 1 if sequence.pending == 1 else min(sequence.pending, budget)
            if count and self._make_room(sequence, count):
                parts.append((sequence, count))
                budget -= count if sequence.pending > 1 else 0
        return _Batch(parts) if parts else None

    def _begin_with_prefix(self) -> list[Continuation]:
        """Give the model's prefix to those that begin with it; return those that need no more."""
        prefix = self._fused.prefix
        assert prefix is not None
        count = len(prefix.ids)
        begun = []
        for sequence in [*self._running]:
            new = sequence.computed == 0 and prefix.leads(sequence.ids)
            if new and sequence in self._running and self._make_room(sequence, count):
                sequence.computed = count
                begun.append(sequence)
        begun = [sequence for sequence in begun if sequence in self._running]
        if begun:
            each = [count] * len(begun)
            rows = BatchRows(each, each, [sequence.table for sequence in begun])
            for layer, (pages, _) in enumerate(self._caches):
                self._fused.write_prefix(layer, pages, rows)
        return [sequence for sequence in begun if not sequence.pending]

    def _advanced(self, batch: _Batch) -> bool:
        """Make a batch of all that run the one of their next tokens, if there are pages for all."""
        needed = [each for each in self._running if _missing(each, 1)]
        if not batch.only_next or len(needed) > self._pool.available:
            return False
        return all(self._make_room(each, 1) for each in needed) and batch.advance()

    def _make_room(self, sequence: Continuation, count: int) -> bool:
        """Give a sequence pages for so many tokens more; False where it was preempted itself."""
        for _ in range(_missing(sequence, count)):
            page = self._pool.take()
            while page is None:
                youngest = self._running[-1]
                self._waiting.appendleft(youngest)
                self._running.pop()
                self._give_up(youngest)
                self.statistics.preemptions += 1
                if youngest is sequence:
                    return False
                page = self._pool.take()
            sequence.table.append(page)
        return True

    def _computed(self, sequence: Continuation, count: int) -> None:
        before = sequence.computed // PAGE_TOKENS
        sequence.computed += count
        for page in range(before, sequence.computed // PAGE_TOKENS):
            self._pool.name(sequence.table[page], sequence.key(page))


def _missing(sequence: Continuation, count: int) -> int:
    return max(0, pages_of(sequence.computed + count) - len(sequence.table))
