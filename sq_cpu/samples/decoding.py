"""What a decoder of speech or images reads in its calibration: what it says itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError, first_line

__all__ = ["shifted_start", "with_own_words"]

_TOKENS = 64


def shifted_start(model: Any) -> int:
    """Return the id that a decoder begins with; `SqCpuError` where no config says it."""
    configs = (model.config, getattr(model, "generation_config", None))
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for config in configs:
            value = getattr(config, name, None)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int):
                return value
    raise SqCpuError(
        f"the config of {type(model).__name__} names no decoder_start_token_id: add it"
    )


@torch.no_grad()
def with_own_words(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add `decoder_input_ids`, int64 [1, tokens]: what the model itself says, greedily.

    It begins with nothing but the decoder's first token, so that Whisper says the language and the
    task, too. The end-of-text token is left out. `inputs` are of one recording, or image.
    """
    ids = [shifted_start(model)]
    limits = (getattr(model.config, name, None) for name in ("max_target_positions", "max_length"))
    most = min([_TOKENS, *(each for each in limits if isinstance(each, int) and each > 1)])
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    given: dict[str, Any] = dict(inputs)
    cache, step = None, ids
    try:
        while len(ids) < most:
            output = model(
                **given,
                decoder_input_ids=torch.tensor([step]),
                past_key_values=cache,
                use_cache=True,
            )
            step = [int(output.logits[0, -1].argmax())]
            if step[0] in ends:
                break
            ids = ids + step
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                step = ids
            # The encoder has run.
            masks = {name: value for name, value in inputs.items() if name == "attention_mask"}
            given = {"encoder_outputs": (output.encoder_last_hidden_state,), **masks}
    except Exception as error:  # whatever a model's own code raises
        raise SqCpuError(
            f"{type(model).__name__} fails to decode ({type(error).__name__}: "
            f"{first_line(error)}); in Python, give sq_cpu.calibrate batches of its own inputs"
        ) from error
    return {**inputs, "decoder_input_ids": torch.tensor([ids])}
