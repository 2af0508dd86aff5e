"""The class of a model, by what its config says: of transformers or, if trusted, of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

__all__ = ["named_class", "other_class", "task_class"]

# Of a type that has a causal language model: without its head, with another, or with an encoder.
_OTHER_HEADS = (
    MODEL_MAPPING_NAMES,
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
# Tried in this order where a config names no class.
_TASKS = (
    transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    transformers.MODEL_MAPPING,
)


def other_class(config: Mapping[str, Any]) -> str | None:
    """Return the name of the class where a config is of no causal language model.

    None where it is of one, or says nothing: what loads the model then says what is wrong.
    transformers would make a decoder of a BERT's weights, without a word.
    """
    kind = str(config.get("model_type"))
    own = _own(config)
    references = config.get("auto_map")
    if isinstance(references, Mapping):
        is_causal = "AutoModelForCausalLM" in references
        named = {str(each).rpartition(".")[2] for each in references.values()}
        return None if is_causal or own not in named else own
    if kind not in CONFIG_MAPPING_NAMES or references is not None:
        return None
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    has_encoder = causal is None or kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if own is None:
        return str(MODEL_MAPPING_NAMES.get(kind, kind)) if has_encoder else None
    if own != causal and (has_encoder or any(own == each.get(kind) for each in _OTHER_HEADS)):
        return own
    return None


def _own(config: Mapping[str, Any]) -> str | None:
    given = config.get("architectures")
    own = given[0] if isinstance(given, list) and given else None
    return own if isinstance(own, str) else None


def named_class(config: Any, source: str | Path, trust: bool) -> Any:
    """Return the class that a config names first; None where nobody has it, or it is not trusted.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    source : the folder, or hub model, that the config is of
    trust : whether code of it may run
    """
    (name, *_) = config.architectures
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    references = getattr(config, "auto_map", None) or {}
    for reference in references.values() if trust else ():
        if isinstance(reference, str) and reference.rpartition(".")[2] == name:
            return get_class_from_dynamic_module(
                reference, os.fspath(source), trust_remote_code=True
            )
    return None


def task_class(config: Any, source: str | Path, trust: bool, *, base: bool = False) -> Any:
    """Return the class of a model that is no causal language model, as `named_class` does.

    Where its config names none, and for its `base` (what a sentence encoder calls), it is what
    transformers maps the type to, unless a base is named itself, as T5EncoderModel.
    """
    named = str((config.architectures or [""])[0])
    to_base = base and not named.endswith("Model")
    tasks = (transformers.MODEL_MAPPING,) if to_base else () if named else _TASKS
    for task in tasks:
        found = task.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, tuple | list) else found
    return named_class(config, source, trust) if named else None
