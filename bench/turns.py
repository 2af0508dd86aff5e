"""Variants in turn at one piece of work, and what their answers are worth."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from harness import Candidate
from numpy.typing import NDArray
from worker import Answer, Worker, WorkerError

FP32 = "fp32"
"""The variant that judges the others."""
# An OpenMP pool spins for some milliseconds after its work before it sleeps.
_REST = 0.02
_LEAST_GAIN = 1e-3  # nats by which fp32's own text is likelier than tokens at random

Work = Literal["prefill", "decode"]


class WorkItem(NamedTuple):
    """What is timed."""

    number: int
    kind: Work
    rows: int
    tokens: int
    """Of the prompt, or before the first decoded token."""
    steps: int
    room: int


def random_prompts(vocabulary: int, rows: int, tokens: int, seed: int) -> list[list[int]]:
    """Return ids that no other seed gives: a runtime may keep what it computed for a prefix."""
    draw = random.Random(seed)
    return [[draw.randrange(vocabulary) for _ in range(tokens)] for _ in range(rows)]


class Turn(Candidate):
    """A worker's turn at some work, with other prompts each time.

    Once it has failed, its turns take forever: the others go on.
    """

    def __init__(self, worker: Worker, vocabulary: int, work: WorkItem, limit: float) -> None:
        super().__init__(lambda _: self.time())
        self.worker, self.failure = worker, ""
        self._vocabulary, self._work, self._limit = vocabulary, work, limit
        self._seed = 1_000_000 * (1 + work.number)  # of the prompts; all variants have the same
        self._room = 0

    def _ask(self, do: str, **more: Any) -> Answer:
        answer = self.worker.ask(do, self._limit, **more)
        tokens = np.array(answer.get("tokens", []))
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self._vocabulary):
            raise WorkerError(
                f"{self.worker.name}: token {tokens.min()} or {tokens.max()} is not in the "
                f"vocabulary of {self._vocabulary}"
            )
        return answer

    def _prefill(self) -> float:
        prompts = random_prompts(
            self._vocabulary, self._work.rows, self._work.tokens, seed=self._seed
        )
        self._seed += 1
        self._prompt = prompts[0]
        answer = self._ask("prefill", prompts=prompts)
        self._first: int = answer["tokens"][0]
        self._room = self._work.room
        return float(answer["seconds"])

    def _decode(self) -> Answer:
        self._room -= self._work.steps + 1
        return self._ask("decode", steps=self._work.steps)

    def rotate(self) -> None:
        """Let the others fall asleep, and begin a sequence anew that has grown enough."""
        time.sleep(_REST)
        if self._work.kind == "decode" and not self.failure:
            try:
                if self._room <= self._work.steps:
                    self._prefill()
            except WorkerError as error:
                self.failure = str(error)

    def time(self) -> float:
        """Do the work once; return the seconds that its process took, endless where it failed."""
        if self.failure:
            return math.inf
        try:
            if self._work.kind == "prefill":
                return self._prefill()
            return float(self._decode()["seconds"])
        except WorkerError as error:
            self.failure = str(error)
            return math.inf

    def text(self, path: Path) -> tuple[list[int], list[int], NDArray[np.float32] | None]:
        """Compute the next prompts; return the first and its continuation, and their logits.

        Raises
        ------
        WorkerError
        """
        self._prefill()
        logits = None
        if self.worker.ask("logits", self._limit, path=str(path))["written"]:
            logits = np.load(path)
            path.unlink()
        steps = self._decode()["tokens"]
        return self._prompt, [self._first, *(step[0] for step in steps)], logits

    def score(self, prompt: list[int], tokens: list[int]) -> float:
        """Return the mean logarithm of the probability of tokens after a prompt."""
        answer = self.worker.ask("score", self._limit, prompt=prompt, tokens=tokens)
        return float(answer["log_probability"])


def worst_cosine(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Return the least cosine of a row [vocabulary] with its reference, both less their means.

    Softmax does not see the mean, which would make the logits of any two models alike. NaN where a
    row has one.
    """
    one, other = (each - each.mean(-1, keepdims=True) for each in (logits, reference))
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return float(((one * other).sum(-1) / np.maximum(lengths, 1e-12)).min())


class Verdict(NamedTuple):
    """What a variant's answers are worth."""

    cosine: float | None
    """None where a runtime gives no logits."""
    likelihood: float | None
    refusal: str = ""


def _verdict(
    logits: NDArray[np.float32] | None,
    reference: NDArray[np.float32],
    likelihood: float,
    least_cosine: float,
    least_likelihood: float,
) -> Verdict:
    cosine = None
    if logits is not None:
        if not np.isfinite(logits).all():
            return Verdict(None, None, "the logits are not finite")
        cosine = worst_cosine(logits, reference)
        if cosine < least_cosine:
            reason = f"the logits' cosine with fp32's is {cosine:.4f}, below {least_cosine}"
            return Verdict(cosine, likelihood, reason)
    if not likelihood >= least_likelihood:
        reason = f"its text is worth {likelihood:.2f} of fp32's own, below {least_likelihood}"
        return Verdict(cosine, likelihood, reason)
    return Verdict(cosine, likelihood)


def verify(
    turns: Mapping[str, Turn], least_cosine: float, least_likelihood: float, folder: Path
) -> dict[str, Verdict]:
    """Have every variant answer the same prompts, and judge what comes, by fp32.

    A text's likelihood is the mean logarithm of its tokens' probabilities, on a scale from a token
    at random, 0, to fp32's own text, 1. Where fp32 fails, the others are not asked.
    """
    verdicts: dict[str, Verdict] = {}
    reference: NDArray[np.float32] = np.empty(0, np.float32)
    chance, gain = 0.0, 1.0
    for name in (FP32, *(name for name in turns if name != FP32)):
        try:
            prompt, tokens, logits = turns[name].text(folder / "logits.npy")
            score = turns[FP32].score(prompt, tokens)
        except WorkerError as error:
            verdicts[name] = Verdict(None, None, str(error))
        else:
            if name == FP32:
                assert logits is not None
                reference, chance = logits, -math.log(logits.shape[1])
                gain = max(score - chance, _LEAST_GAIN)
            likelihood = (score - chance) / gain
            verdicts[name] = _verdict(logits, reference, likelihood, least_cosine, least_likelihood)
        if name == FP32 and verdicts[name].refusal:
            break
    return verdicts
