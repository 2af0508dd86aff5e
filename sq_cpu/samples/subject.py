"""A model beside what prepares its inputs, and what that says of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from sq_cpu.checkpoint.preprocessors import Preprocessor
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.models.checks import input_embeddings

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """A float model that is no causal language model, and its preprocessor."""

    model: Any
    preprocessor: Preprocessor
    shipped: Sequence[str]
    """Documents to read where the user gives none."""

    @cached_property
    def arguments(self) -> frozenset[str]:
        """The names that its forward takes."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    @property
    def name(self) -> str:
        """The name of its class."""
        return type(self.model).__name__

    @property
    def decodes(self) -> bool:
        """Whether it has a decoder whose tokens it is to be given.

        A classifier with a decoder makes them of the encoder's.
        """
        can = self.model.can_generate() or self.model.base_model is self.model
        return can and "decoder_input_ids" in self.arguments

    @property
    def pad(self) -> int | None:
        """The id that rows of texts are padded with; None: they cannot be."""
        found: int | None = getattr(self.preprocessor.tokenizer, "pad_token_id", None)
        return found

    def longest(self, window: int) -> int:
        """Return how many tokens of a text it reads: at most a window."""
        config = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        positions = getattr(text, "max_position_embeddings", None)
        limits = [window, getattr(self.preprocessor.tokenizer, "model_max_length", None)]
        if isinstance(positions, int) and positions > 0:
            # RoBERTa counts from behind its padding's row.
            words = input_embeddings(self.model)
            skipped = [
                module.padding_idx + 1
                for module in self.model.modules()
                if isinstance(module, nn.Embedding)
                and module.num_embeddings == positions
                and module.padding_idx is not None
                and module is not words
            ]
            limits.append(positions - max(skipped, default=0))
        return int(min(each for each in limits if isinstance(each, int) and each > 0))

    def prepared(self, part: Any, *args: Any, **options: Any) -> dict[str, Tensor]:
        """Return what a part of the preprocessor makes, as far as the forward takes it.

        Floats have the model's dtype. `SqCpuError` for what it refuses, with its reason.
        """
        made = self.made(part, *args, return_tensors="pt", **options)
        dtype = self.model.dtype
        return {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in made.items()
            if name in self.arguments and isinstance(value, Tensor)
        }

    def made(self, part: Any, *args: Any, **options: Any) -> Mapping[str, Any]:
        """Return all that a part of the preprocessor makes; refuses alike."""
        try:
            found: Mapping[str, Any] = part(*args, **options)
        except Exception as error:  # whatever its own code raises
            raise SqCpuError(
                f"{type(part).__name__} fails on a sample ({type(error).__name__}: "
                f"{first_line(error)}); in Python, give sq_cpu.calibrate batches of its own inputs"
            ) from error
        return found
