"""A tiny model that O1 keeps, and O3 only where tokens of massive activations get own scales."""

from __future__ import annotations

from typing import Any

import torch
from byte_models import byte_model, byte_tokenizer
from command_line import TEXT

import sq_cpu

MASSIVE = "T"
"""The byte whose activations are massive: one of the 45 of a sentence of `TEXT`."""


def massive_model() -> Any:
    """Return a model that predicts `TEXT`, but that is massive at one of its bytes.

    All channels of the first down projection's input are there a thousand times as large as
    elsewhere, which no smoothing scale changes.
    """
    model, channel = byte_model(), 5
    (token,) = byte_tokenizer().encode(MASSIVE, add_special_tokens=False)
    block = model.model.layers[0]
    with torch.no_grad():
        # A channel of the residual stream that is zero but at that byte.
        model.model.embed_tokens.weight[:, channel] = 0
        model.model.embed_tokens.weight[token, channel] = 30
        block.self_attn.o_proj.weight[channel] = 0
        block.self_attn.o_proj.bias[channel] = 0
        for linear in (block.mlp.gate_proj, block.mlp.up_proj):
            linear.weight[:, channel] = 4 + 2 * torch.rand(len(linear.weight))
        _fit_head(model)
    return model


def _fit_head(model: Any) -> None:
    """Make the head the ridge regression from the last states to the next bytes of `TEXT`."""
    ids = torch.tensor([byte_tokenizer().encode(TEXT, add_special_tokens=False)])
    states = model.model(ids).last_hidden_state[0, :-1].double()
    wanted = 10 * torch.nn.functional.one_hot(ids[0, 1:], model.config.vocab_size).double()
    gram = states.T @ states
    ridge = 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    model.lm_head.weight.copy_(torch.linalg.solve(gram + ridge, states.T @ wanted).T)


def calibration(model: Any) -> sq_cpu.Calibration:
    windows = sq_cpu.token_windows(byte_tokenizer(), TEXT, window=64, windows=4)
    return sq_cpu.calibrate(model, windows, progress=False)
