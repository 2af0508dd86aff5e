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
    PreTrainedTokenizerBase,
)

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.parsing import read_json, typed

__all__ = ["Preprocessor", "load_preprocessor", "sentence_files"]

_MODULES = "modules.json"
# Of sentence-transformers, beside those of transformers.
_SENTENCE_FILES = (_MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
# By the model's main input: what else there may be where a folder has no whole processor.
_PARTS = {
    "input_ids": ("tokenizer", AutoTokenizer),
    "pixel_values": ("image processor", AutoImageProcessor),
    "input_features": ("feature extractor", AutoFeatureExtractor),
    "input_values": ("feature extractor", AutoFeatureExtractor),
}


@dataclass(frozen=True)
class Preprocessor:
    """A tokenizer, a feature extractor, an image processor, or a processor that has several."""

    whole: Any
    """What transformers loaded."""
    companions: dict[str, Path] = field(default_factory=dict)
    """Files of sentence-transformers, by their paths in a model's folder."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""
        found = getattr(self.whole, "tokenizer", None)
        return self.whole if isinstance(self.whole, PreTrainedTokenizerBase) else found

    @property
    def features(self) -> Any:
        """The feature extractor of sound, or None."""
        found = getattr(self.whole, "feature_extractor", None)
        return found if found is not None else self._itself("sampling_rate")

    @property
    def images(self) -> Any:
        """The image processor, or None."""
        found = getattr(self.whole, "image_processor", None)
        return found if found is not None else self._itself("image_mean", "do_resize")

    def _itself(self, *attributes: str) -> Any:
        return self.whole if any(hasattr(self.whole, name) for name in attributes) else None

    @property
    def pools(self) -> bool:
        """Whether the model is the encoder of a sentence embedding."""
        return _MODULES in self.companions

    def save_pretrained(self, folder: Path) -> None:
        """Write all files."""
        self.whole.save_pretrained(folder)
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
        Where there is none that gives that input, or no vocabulary.
    """
    part, auto = _PARTS.get(main_input, ("processor", AutoProcessor))
    reason = ""
    for each in dict.fromkeys((AutoProcessor, auto)):
        try:
            made = Preprocessor(each.from_pretrained(source, trust_remote_code=trust), companions)
        except Exception as error:  # files that are missing, damaged or unknown raise all kinds
            reason = first_line(error)
            continue
        if not _is_empty(made.tokenizer):
            return made
        reason = "the files of its tokenizer are missing; get the whole model"
    raise SqCpuError(f"cannot load the {part} of {what}: {reason}")


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
    return found


def _files(root: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(root).as_posix(), path
