"""What turns texts, sound and images into a model's inputs, and the files that go with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.utils import cached_file

from sq_cpu.checkpoint.skeleton import reason_of
from sq_cpu.errors import SqCpuError
from sq_cpu.extras import require
from sq_cpu.parsing import read_json, typed

__all__ = ["Preprocessor", "load_preprocessor", "sentence_files"]

_MODULES, _PROCESSOR = "modules.json", "processor_config.json"
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
# Of sentence-transformers, beside those of transformers.
_SENTENCE_FILES = (_MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
# By the model's main input: which part it needs, what that is called, and what loads it where the
# folder has no whole processor.
_PARTS: dict[str, tuple[str, str, Any]] = {
    "input_ids": ("tokenizer", "tokenizer", AutoTokenizer),
    "pixel_values": ("images", "image processor", AutoImageProcessor),
    "input_features": ("features", "feature extractor", AutoFeatureExtractor),
    "input_values": ("features", "feature extractor", AutoFeatureExtractor),
}


@dataclass(frozen=True)
class Preprocessor:
    """A tokenizer, a feature extractor, an image processor, or a processor that has several."""

    parts: tuple[Any, ...]
    """What transformers loaded; the first is the whole, where there is one."""
    companions: dict[str, Path] = field(default_factory=dict)
    """Files of sentence-transformers, by their paths in a model's folder."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return self._part("tokenizer", "all_special_ids")

    @property
    def features(self) -> Any:
        """The feature extractor of sound, or None."""
        return self._part("feature_extractor", "sampling_rate")

    @property
    def images(self) -> Any:
        """The image processor, or None."""
        return self._part("image_processor", "do_resize")

    def _part(self, name: str, attribute: str) -> Any:
        """Return what a processor has by this name, or what has this attribute itself."""
        for each in self.parts:
            if getattr(each, name, None) is not None:
                return getattr(each, name)
            if hasattr(each, attribute):
                return each
        return None

    @property
    def pools(self) -> bool:
        """Whether the model is the encoder of a sentence embedding."""
        return _MODULES in self.companions

    def save_pretrained(self, folder: Path) -> None:
        """Write all files."""
        for each in self.parts:
            each.save_pretrained(folder)
        for name, path in self.companions.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def load_preprocessor(
    source: str | Path, main_input: str, companions: dict[str, Path], what: str, trust: bool
) -> Preprocessor:
    """Load what a model needs beside it; its own code runs if it is trusted.

    Parameters
    ----------
    source : folder or hub name
    main_input : the model's `main_input_name`
    companions : of `sentence_files`
    what : what the source is called in messages

    Raises
    ------
    SqCpuError
        Where there is none that gives that input, no vocabulary, or no package for images.
    """
    part, called, auto = _PARTS.get(main_input, ("", "processor", AutoProcessor))
    if part == "images":
        require("PIL", "vision")
    parts = _whole(source, what, trust)
    found, lacking = Preprocessor(parts), {}
    if found.tokenizer is None and _has(source, *_TOKENIZERS):
        lacking["tokenizer"] = AutoTokenizer
    if part and getattr(found, part) is None:
        lacking[called] = auto
    for name, each in lacking.items():
        try:
            parts += (each.from_pretrained(source, trust_remote_code=trust),)
        except Exception as error:  # files that are missing, damaged or unknown raise all kinds
            reason = reason_of(error)
            raise SqCpuError(f"cannot load the {name} of {what}: {reason}") from error
    made = Preprocessor(parts, companions)
    if _is_empty(made.tokenizer):
        raise SqCpuError(
            f"cannot load the tokenizer of {what}: the files of its tokenizer are missing; get the "
            "whole model"
        )
    if not parts or (part and getattr(made, part) is None):
        raise SqCpuError(f"cannot load the {called} of {what}: it has none")
    return made


def _whole(source: str | Path, what: str, trust: bool) -> tuple[Any, ...]:
    """Return what transformers takes for the whole; nothing where only parts may be there.

    So it is of a type that has no processor, and of a folder that lacks a part of it.
    """
    try:
        made = (AutoProcessor.from_pretrained(source, trust_remote_code=trust),)
    except Exception as error:  # as above
        if _has(source, _PROCESSOR):
            raise SqCpuError(f"cannot load the processor of {what}: {reason_of(error)}") from error
        return ()
    is_without = _is_empty(Preprocessor(made).tokenizer) and not _has(source, *_TOKENIZERS)
    return () if is_without else made


def _has(source: str | Path, *names: str) -> bool:
    """Say whether a folder, or hub model, has one of these files."""
    options = {"_raise_exceptions_for_missing_entries": False}
    return any(cached_file(source, name, **options) is not None for name in names)


def _is_empty(tokenizer: Any) -> bool:
    """Whether it has no words: transformers makes such a one where there is no file."""
    return tokenizer is not None and len(tokenizer) <= len(tokenizer.all_special_ids)


def sentence_files(source: str | Path) -> dict[str, Path]:
    """Return the files of sentence-transformers in a folder, or hub model, of a pooled encoder.

    By their paths in it; empty for any other. `SqCpuError` for a list of modules that is none.
    """
    root = Path(source)
    if not root.is_dir():
        patterns = [*_SENTENCE_FILES, "[0-9]*_*/*"]
        root = Path(snapshot_download(str(source), allow_patterns=patterns))
    listed = root / _MODULES
    if not listed.is_file():
        return {}
    modules = typed(list[dict[str, Any]], read_json(listed), str(listed))
    if not any("Pooling" in str(module.get("type")) for module in modules):
        return {}  # a cross-encoder: all that it needs is the model
    found = {name: root / name for name in _SENTENCE_FILES if (root / name).is_file()}
    for module in modules:
        path = PurePosixPath(str(module.get("path", "")))
        if path.is_absolute() or ".." in path.parts:
            raise SqCpuError(f"{listed}: {path} is no folder beside it; get the model again")
        if path.parts:
            found |= dict(_files(root, root / path))
    real = root.resolve()
    inside = [real, real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [real]
    for name, file in found.items():
        if not any(file.resolve().is_relative_to(each) for each in inside):
            raise SqCpuError(f"{root / name} is a link out of the model's folder; copy the file")
    return found


def _files(root: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(root).as_posix(), path
