"""The part of a model that its head, and whatever else comes after the blocks, stands on."""

from __future__ import annotations

from typing import Any

from torch import nn

from sq_cpu.models.families import family_of

__all__ = ["decoder_of"]


def decoder_of(model: Any) -> nn.Module:
    """Return the module that makes the last hidden state of ids: of decoders, without the head."""
    family = family_of(model)
    base: nn.Module = getattr(model, "base_model", model)
    path = None if family is None or family.decoder is None else family.decoder.base
    if path is None:
        return base
    try:
        return base.get_submodule(path)
    except AttributeError:
        return base
