"""Texts with a prefix, and models whose own rows of it are spoilt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BOS = 1
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


def texts(prefix: tuple[int, ...] = (BOS,), rows: int = 3, length: int = 14) -> Tensor:
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(2))
    ids[:, : len(prefix)] = torch.tensor(prefix)
    return ids


def padded(ids: Tensor) -> dict[str, Tensor]:
    """Return a batch in which each text begins one position after the one before."""
    batch = torch.zeros(len(ids), ids.shape[1] + len(ids) - 1, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, text in enumerate(ids):
        batch[row, row : row + len(text)] = text
        mask[row, row:] = 1
        batch[row, row + len(text) :] = 7
    return {"input_ids": batch, "attention_mask": mask}


def spoil(model: Any, prefix: tuple[int, ...] = (BOS,)) -> Any:
    """Make the model's own rows of the prefix something else."""
    weight = model.get_input_embeddings().weight
    noise = torch.randn(len(prefix), weight.shape[1], generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        weight[list(prefix)] = noise.to(weight)
    return model


def off(made: Tensor, wanted: Tensor) -> float:
    """Return the relative error of logits; those of tokens that were spoilt in a tied head aside.

    Ids up to 2 are no others.
    """
    made, wanted = made[..., 3:].float(), wanted[..., 3:].float()
    return float((made - wanted).norm() / wanted.norm())
