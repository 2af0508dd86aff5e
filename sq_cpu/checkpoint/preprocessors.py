"""What turns texts, sound and images into a model's inputs, and the files that go with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
)

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.extras import require
from sq_cpu.parsing import read_json, typed

__all__ = ["Preprocessor", "load_preprocessor", "sentence_files"]

_MODULES = "modules.json"
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
    made, reason = Preprocessor((), companions), ""
    for each in dict.fromkeys((AutoProcessor, auto)):
        try:
            loaded = each.from_pretrained(source, trust_remote_code=trust)
        except Exception as error:  # files that are missing, damaged or unknown raise all kinds
            reason = first_line(error)
            continue
        more = replace(made, parts=(*made.parts, loaded))
        if _is_empty(more.tokenizer):
            reason = "the files of its tokenizer are missing; get the whole model"
            continue
        made = more
        if not part or getattr(made, part) is not None:
            return made
    raise SqCpuError(f"cannot load the {called} of {what}: {reason or 'it has none'}")


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
