"""A tiny model that reads bytes, with its tokenizer: no file, no download."""

from pathlib import Path
from typing import Any

from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes: no file, no download; ids 0..2 are special."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def byte_model(**config: Any) -> Any:
    return tiny_model("llama", vocab_size=259, max_position_embeddings=1024, **config)


def save_float(folder: Path, **config: Any) -> Path:
    byte_model(**config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
