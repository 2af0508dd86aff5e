"""Folders of tiny float models that are no language models, and files of what they take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from byte_models import byte_tokenizer
from tiny import tiny_model

BYTES = {"vocab_size": 259}
RATE = 16_000


def write_images(folder: Path, count: int = 10) -> Path:
    """Write noise of several sizes, in color."""
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (9 + number, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def write_sound(folder: Path, count: int = 6, rate: int = 8000) -> Path:
    """Write chirps, half of them as .wav and half as .flac."""
    soundfile = pytest.importorskip("soundfile")
    folder.mkdir()
    times = np.arange(rate) / rate
    for number in range(count):
        samples = 0.3 * np.sin(2 * np.pi * (200 + 300 * number * times) * times)
        kind = ("wav", "flac")[number % 2]
        soundfile.write(folder / f"{number}.{kind}", samples.astype(np.float32), rate)
    return folder


def write_pairs(path: Path, count: int = 12) -> Path:
    """Write pairs of texts, each of another length."""
    lines = [f"a question{'?' * k}\tthe answer {'x' * (2 * k)}" for k in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def _saved(folder: Path, model: Any, *others: Any) -> Path:
    for each in (model, *others):
        each.save_pretrained(folder)
    return folder


def _of_texts(name: str) -> Callable[[Path], Path]:
    return lambda folder: _saved(folder, tiny_model(name, **BYTES), byte_tokenizer())


def _cross_encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.BertConfig(num_hidden_layers=2, num_labels=3, **sizes, **BYTES)
    model = transformers.BertForSequenceClassification(config)
    _saved(folder, model, byte_tokenizer())
    settings = folder / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | names))
    return folder


def _decoder_without_head(folder: Path) -> Path:
    return _saved(folder, tiny_model("llama", **BYTES).model, byte_tokenizer())


def _images_alone() -> Any:
    return transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})


def _clip(folder: Path) -> Path:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text |= {"num_hidden_layers": 2, "max_position_embeddings": 24, **BYTES}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    )
    processor = transformers.CLIPProcessor(images, byte_tokenizer())
    return _saved(folder, tiny_model("clip", text_config=text), processor)


def _whisper(folder: Path) -> Path:
    # Of 24 frames, as the model has 12 positions.
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=8, chunk_length=1, hop_length=RATE // 24
    )
    return _saved(folder, tiny_model("whisper"), extractor)


def _wav2vec2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        conv_dim=(16, 16),
        conv_stride=(20, 20),
        conv_kernel=(40, 40),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        vocab_size=32,
    )
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    return _saved(folder, transformers.Wav2Vec2ForCTC(config), extractor)


def _captioner(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    decoder = transformers.BertConfig(
        num_hidden_layers=2, is_decoder=True, add_cross_attention=True, **sizes, **BYTES
    )
    model = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(tiny_model("vit").config),
        decoder=transformers.BertLMHeadModel(decoder),
    )
    model.config.decoder_start_token_id = 1
    return _saved(folder, model, _images_alone(), byte_tokenizer())


# By name: what writes the folder, the class, and the files that it is calibrated on.
MODELS: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "bert": (_of_texts("bert"), "BertForMaskedLM", ""),
    "roberta": (_of_texts("roberta"), "RobertaForMaskedLM", "text"),
    "llama": (_decoder_without_head, "LlamaModel", "text"),
    "cross-encoder": (_cross_encoder, "BertForSequenceClassification", "pairs"),
    "t5": (_of_texts("t5"), "T5ForConditionalGeneration", "text"),
    "t5-pairs": (_of_texts("t5"), "T5ForConditionalGeneration", "pairs"),
    "vit": (
        lambda folder: _saved(folder, tiny_model("vit"), _images_alone()),
        "ViTForImageClassification",
        "images",
    ),
    "captioner": (_captioner, "VisionEncoderDecoderModel", "images"),
    "clip": (_clip, "CLIPModel", "images"),
    "whisper": (_whisper, "WhisperForConditionalGeneration", "sound"),
    "wav2vec2": (_wav2vec2, "Wav2Vec2ForCTC", "sound"),
}


def write_model(name: str, folder: Path) -> Path:
    """Write the float model of one of MODELS, with what prepares its inputs."""
    return MODELS[name][0](folder)


def write_samples(kind: str, folder: Path) -> Path:
    """Write samples of a kind of MODELS."""
    if kind == "images":
        return write_images(folder / "images")
    if kind == "sound":
        return write_sound(folder / "sound")
    if kind == "pairs":
        return write_pairs(folder / "pairs.tsv")
    path = folder / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path
