"""How far one model's predictions are from another's: perplexities, KL, and the first choice."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROWS = 64  # logits of a large vocabulary, a block at a time


class Divergence:
    """What windows of text say of a subject beside its reference."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._same = 0
        self._windows: list[int] = []

    def add(self, reference: Tensor, subject: Tensor, ids: Tensor) -> None:
        """Count one window.

        Parameters
        ----------
        reference, subject : logits [tokens, vocabulary]
        ids : int64 [tokens]
        """
        for begin in range(0, len(ids), _ROWS):
            rows = slice(begin, begin + _ROWS)
            both = [logits[rows].float().log_softmax(dim=1) for logits in (reference, subject)]
            self._kl.append((both[0].exp() * (both[0] - both[1])).sum(dim=1))
            self._same += int((both[0].argmax(1) == both[1].argmax(1)).sum())
            next_ids = ids[begin + 1 : begin + 1 + _ROWS, None]
            likelihoods = [each[: len(next_ids)].gather(1, next_ids) for each in both]
            self._losses.append(-torch.cat(likelihoods, dim=1).T)
        self._windows.append(len(ids))

    def summary(self) -> dict[str, float]:
        """Return the figures; KL in nats, of each token's distribution to the reference's.

        `percent` is what the subject's perplexity has above the reference's, `percent_error` its
        standard error, tokens taken as independent.
        """
        kl, losses = torch.cat(self._kl), torch.cat(self._losses, dim=1).double()
        more = losses[1] - losses[0]
        reference, subject = (math.exp(float(loss.mean())) for loss in losses)
        return {
            "tokens": self._windows[0],
            "windows": len(self._windows),
            "reference_perplexity": reference,
            "perplexity": subject,
            "percent": 100 * (subject / reference - 1),
            "percent_error": 100 * float(more.std()) / math.sqrt(len(more)),
            "kl_mean": float(kl.mean()),
            "kl_median": float(kl.median()),
            "kl_p99": float(kl.quantile(0.99)),
            "same_top_1": self._same / len(kl),
        }
