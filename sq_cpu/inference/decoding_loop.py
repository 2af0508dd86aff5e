"""The loop of transformers' `generate`, by a scheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process, stopping_criteria

from sq_cpu.inference.fusing import fused_of
from sq_cpu.inference.generation import generate_batch
from sq_cpu.inference.masks import token_runs
from sq_cpu.inference.requests import Request
from sq_cpu.inference.sampling import Sampling
from sq_cpu.models.hf_private import sampling_loop

__all__ = ["decoding_loop"]


def decoding_loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Continue prompts: `model.generate(..., custom_generate=sq_cpu.decoding_loop)`.

    A fused model generates without a step of transformers' own loop: greedily, or by temperature,
    top-k, top-p, min-p and repetition penalty, from torch's random seed. Any other processor,
    criterion, mask or output, and a model that is not fused, gets the loop that it has without
    this one. A cache that is given empty is not filled, and transformers hands no streamer to a
    loop that it is given: `generate` without this one streams.

    Parameters
    ----------
    The arguments that transformers gives a `custom_generate`.

    Returns
    -------
    int64 [batch, tokens], padded behind
    """
    given = {
        "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
        "generation_config": generation_config,
        "synced_gpus": synced_gpus,
        "streamer": streamer,
        **model_kwargs,
    }
    requests = _requests(model, input_ids, given)
    if requests is None:
        return sampling_loop(model)(input_ids, **given)
    on_token = None
    if streamer is not None:

        def on_token(_: int, token: int) -> None:
            streamer.put(torch.tensor([token]))

    made = generate_batch(model, requests, on_token=on_token)
    if streamer is not None:
        streamer.end()
    longest = max(map(len, made))
    pad = generation_config.pad_token_id
    filled = [tokens + [pad or 0] * (longest - len(tokens)) for tokens in made]
    return torch.cat((input_ids, torch.tensor(filled)), dim=1)


def _requests(model: Any, ids: Tensor, given: dict[str, Any]) -> list[Request] | None:
    """Return what a scheduler is to do; None where that is not all that is asked for."""
    config, cache = given["generation_config"], given.get("past_key_values")
    fused = fused_of(model)
    if fused is None or not fused.has_head or fused.hooked() or given["synced_gpus"]:
        return None
    if config.num_beams != 1 or config.return_dict_in_generate:
        return None
    if (given["streamer"] is not None and len(ids) != 1) or (
        cache is not None and cache.get_seq_length()
    ):
        return None
    mask = given.get("attention_mask")
    runs = (None, None) if mask is None else token_runs(mask, ids.shape[1])
    if runs is None or runs[1] is not None:
        return None
    begins = runs[0] or [0] * len(ids)
    sampling = _sampling(given["logits_processor"], config, begins)
    ends = _ends(given["stopping_criteria"], ids.shape[1])
    if sampling is None or ends is None:
        return None
    new, stops = ends
    return [
        Request(
            prompt=row[begin:].tolist(),
            max_new_tokens=new,
            sampling=sampling,
            stop_tokens=stops,
            stream=index,
        )
        for index, (row, begin) in enumerate(zip(ids, begins, strict=True))
    ]


def _ignores(ignored: Any, begins: list[int]) -> bool:
    """Tell whether a penalty leaves out the padding, as ours does, and nothing else."""
    if isinstance(ignored, Tensor):
        return bool(ignored.tolist() == begins)
    return not ignored and not any(begins)


def _sampling(processors: Any, config: Any, begins: list[int]) -> Sampling | None:
    settings: dict[str, Any] = {}
    for each in processors:
        kind = type(each)
        if kind is logits_process.TemperatureLogitsWarper:
            settings["temperature"] = float(each.temperature)
        elif kind is logits_process.TopKLogitsWarper:
            settings["top_k"] = int(each.top_k)
        elif kind is logits_process.TopPLogitsWarper and each.min_tokens_to_keep == 1:
            settings["top_p"] = float(each.top_p)
        elif kind is logits_process.MinPLogitsWarper and each.min_tokens_to_keep == 1:
            settings["min_p"] = float(each.min_p)
        elif kind is logits_process.RepetitionPenaltyLogitsProcessor and (
            _ignores(each.prompt_ignore_length, begins)
        ):
            settings["repetition_penalty"] = float(each.penalty)
        else:
            return None
    if {"top_p", "min_p"} <= settings.keys():  # ours come in the other order
        return None
    if config.do_sample:
        settings.setdefault("temperature", 1.0)
        settings["seed"] = int(torch.randint(2**62, (1,)))
    elif settings.keys() - {"repetition_penalty"}:
        return None
    return Sampling(**settings)


def _ends(criteria: Any, prompt: int) -> tuple[int, list[int]] | None:
    """Return how many tokens may be made, and those that stop."""
    new, stops = 0, list[int]()
    for each in criteria:
        if type(each) is stopping_criteria.MaxLengthCriteria:
            new = int(each.max_length) - prompt
        elif type(each) is stopping_criteria.EosTokenCriteria:
            stops = each.eos_token_id.tolist()
        else:
            return None
    return (new, stops) if new > 0 else None
