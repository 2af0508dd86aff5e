"""What kinds of samples there are: which model takes which, and how its batches are made.

A kind is a row of data. A model's is found by the name of its main input and by what its
preprocessor has, never by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sq_cpu.checkpoint.preprocessors import Preprocessor
from sq_cpu.errors import SqCpuError
from sq_cpu.models.tokenizers import encoded, surrounding_ids
from sq_cpu.samples.decoding import shifted_start, with_own_words
from sq_cpu.samples.files import files_of
from sq_cpu.samples.images import IMAGES, read_image
from sq_cpu.samples.pairs import PAIRS, read_pairs, read_text
from sq_cpu.samples.sound import SOUND, read_sound
from sq_cpu.samples.subject import Subject

__all__ = ["Kind", "Row", "kind_of"]

Row = Any
Inputs = dict[str, Tensor]
_BATCH = 8
_SHIPPED = 300  # characters of a document, where a text belongs to an image


@dataclass(frozen=True)
class Kind:
    """A kind of samples."""

    name: str
    """What a row is, in the plural."""
    rows: Callable[[Subject, Sequence[Path], int], list[Row]]
    """The rows of files, or of what is shipped, for texts of at most so many tokens."""
    batch: Callable[[Subject, list[Row], int], Inputs]
    """What the model is called with for some rows."""
    together: int = 1
    """Rows of a batch, at most."""
    are_cut: bool = False
    """Whether rows are as long as a window."""


# --- texts ----------------------------------------------------------------------------------------


def _windows(subject: Subject, paths: Sequence[Path], longest: int) -> list[Row]:
    """Return the ids of running texts, without special ones, as many as a window has room for."""
    tokenizer = subject.preprocessor.tokenizer
    length = _room(subject, longest)
    found = []
    for text in [read_text(path) for path in paths] or subject.shipped:
        ids = _ids(tokenizer, text)
        found += [ids[k : k + length] for k in range(0, len(ids), length)]
    return found


def _room(subject: Subject, longest: int) -> int:
    front, end = surrounding_ids(subject.preprocessor.tokenizer)
    sides = 2 if subject.decodes else 1
    room = sides * (longest - len(front) - len(end))
    if room < sides:
        raise SqCpuError(
            f"a window of {longest} tokens is filled by the tokenizer's special ones: ask for a "
            "longer one"
        )
    return min(room, longest)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return encoded(tokenizer, text, add_special_tokens=False, verbose=False)


def _window_batch(subject: Subject, rows: list[Row], longest: int) -> Inputs:
    front, end = surrounding_ids(subject.preprocessor.tokenizer)
    if not subject.decodes:
        return _padded([[*front, *row, *end] for row in rows], "", subject.pad)
    halves = [(row[: (len(row) + 1) // 2], row[(len(row) + 1) // 2 :]) for row in rows]
    sources = [[*front, *first, *end] for first, _ in halves]
    targets = [[*front, *second, *end] for _, second in halves]
    return _padded(sources, "", subject.pad) | _decoded(subject, targets)


def _padded(rows: Sequence[list[int]], prefix: str, pad: int | None) -> Inputs:
    """Return ids and their mask, int64 [rows, tokens]; rows of one length need no padding."""
    longest = max(map(len, rows))
    ids = [[*row, *[pad or 0] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {
        f"{prefix}input_ids": torch.tensor(ids),
        f"{prefix}attention_mask": torch.tensor(mask),
    }


def _decoded(subject: Subject, targets: Sequence[list[int]]) -> Inputs:
    start = shifted_start(subject.model)
    made = _padded([[start, *target[:-1]] for target in targets], "decoder_", subject.pad)
    return {name: value for name, value in made.items() if name in subject.arguments}


def _pairs(subject: Subject, paths: Sequence[Path], longest: int) -> list[Row]:
    return [pair for path in paths for pair in read_pairs(path)]


def _singles(subject: Subject, paths: Sequence[Path], longest: int) -> list[Row]:
    return [text for path in paths for pair in read_pairs(path) for text in pair]


def _single_batch(subject: Subject, rows: list[Row], longest: int) -> Inputs:
    tokenizer = subject.preprocessor.tokenizer
    padding = len(rows) > 1
    return subject.prepared(tokenizer, rows, truncation=True, max_length=longest, padding=padding)


def _pair_batch(subject: Subject, rows: list[Row], longest: int) -> Inputs:
    tokenizer = subject.preprocessor.tokenizer
    options: dict[str, Any] = {"truncation": True, "max_length": longest, "padding": len(rows) > 1}
    first, second = ([*column] for column in zip(*rows, strict=True))
    if not subject.decodes:
        return subject.prepared(tokenizer, first, second, **options)
    targets = subject.made(tokenizer, text_target=second, truncation=True, max_length=longest)
    made = subject.prepared(tokenizer, first, **options)
    return made | _decoded(subject, targets["input_ids"])


_TEXT = Kind("windows of text", _windows, _window_batch, are_cut=True)
_TEXT_PAIRS = Kind("pairs of texts", _pairs, _pair_batch, _BATCH)
# A sentence encoder reads each text of a pair by itself.
_SINGLE_TEXTS = Kind("texts", _singles, _single_batch, _BATCH)


# --- sound and images -----------------------------------------------------------------------------


def _recordings(subject: Subject, paths: Sequence[Path], longest: int) -> list[Row]:
    return list(files_of(paths, SOUND, "recordings"))


def _sound_batch(subject: Subject, rows: list[Row], longest: int) -> Inputs:
    extractor = subject.preprocessor.features
    rate = int(extractor.sampling_rate)
    samples = [read_sound(path, rate) for path in rows]
    made = subject.prepared(extractor, samples, sampling_rate=rate)
    return with_own_words(subject.model, made) if subject.decodes else made


def _pictures(subject: Subject, paths: Sequence[Path], longest: int) -> list[Row]:
    return list(files_of(paths, IMAGES, "images"))


def _read(subject: Subject, paths: Sequence[Path]) -> list[Any]:
    config = getattr(subject.model.config, "vision_config", None) or subject.model.config
    channels = getattr(config, "num_channels", 3)
    return [read_image(path, channels if isinstance(channels, int) else 3) for path in paths]


def _image_batch(subject: Subject, rows: list[Row], longest: int) -> Inputs:
    made = subject.prepared(subject.preprocessor.images, images=_read(subject, rows))
    return with_own_words(subject.model, made) if subject.decodes else made


def _captioned(subject: Subject, paths: Sequence[Path], longest: int) -> list[Row]:
    """Return images, each with a line of the text files or a piece of the shipped texts."""
    own = [path for path in paths if path.is_file() and path.suffix.lower() not in IMAGES]
    images = files_of([path for path in paths if path not in own], IMAGES, "images")
    if not images:
        raise SqCpuError(
            f"{subject.name} takes images and texts, and {own[0]} is no image: "
            "give images, too, with --calib"
        )
    captions = [line for path in own for line in read_text(path).splitlines() if line.strip()]
    captions = captions or [
        document[k : k + _SHIPPED]
        for document in subject.shipped
        for k in range(0, len(document), _SHIPPED)
    ]
    # No image twice: those that are held out are others.
    return list(zip(images, cycle(captions), strict=False))


def _caption_batch(subject: Subject, rows: list[Row], longest: int) -> Inputs:
    images = _read(subject, [path for path, _ in rows])
    captions = [text for _, text in rows]
    options: dict[str, Any] = {"truncation": True, "max_length": longest, "padding": len(rows) > 1}
    return subject.prepared(subject.preprocessor.parts[0], text=captions, images=images, **options)


_SOUND = Kind("recordings", _recordings, _sound_batch)
_IMAGES = Kind("images", _pictures, _image_batch, _BATCH)
_DESCRIBED = Kind("images", _pictures, _image_batch)  # each of which the decoder ends elsewhere
_CAPTIONED = Kind("images with texts", _captioned, _caption_batch, _BATCH)

# By the name of the main input.
_BY_INPUT = {
    "input_ids": _TEXT,
    "input_features": _SOUND,
    "input_values": _SOUND,
    "pixel_values": _IMAGES,
}
_SHIPPED_FOR = (_TEXT,)
_GIVE = {
    _SOUND.name: f"a folder or files of sound ({', '.join(SOUND)})",
    _IMAGES.name: f"a folder or files of images ({', '.join(IMAGES)})",
    _CAPTIONED.name: "a folder or files of images, and text files for the texts",
}


def _is_both(has: Preprocessor) -> bool:
    """Whether one processor takes images and texts."""
    first = Preprocessor(has.parts[:1])
    return first.tokenizer is not None and first.images is not None


def kind_of(subject: Subject, paths: Sequence[Path]) -> Kind:
    """Return the kind of samples that a model takes, of these files, or else of what is shipped.

    Raises `SqCpuError` for a model that takes something else, and where nothing is shipped.
    """
    has = subject.preprocessor
    name = getattr(subject.model, "main_input_name", "")
    if name not in _BY_INPUT:  # "inputs", where a class takes several kinds
        name = next((each for each in _BY_INPUT if each in subject.arguments), name)
    taken = subject.arguments & _BY_INPUT.keys()
    kind = _BY_INPUT.get(name)
    if taken >= {"input_ids", "pixel_values"} and _is_both(has):
        kind = _CAPTIONED
    elif "input_ids" in taken and has.tokenizer and has.features and len(taken) > 1:
        kind, name = None, " and ".join(sorted(taken))  # texts and sound, as CLAP
    part = {_TEXT: has.tokenizer, _SOUND: has.features, _IMAGES: has.images}
    if kind is None or part.get(kind, has) is None:
        raise SqCpuError(
            f"{subject.name} takes {name or 'what nobody knows'}, of which no files are read: in "
            "Python, load it with its class, and give sq_cpu.calibrate batches of its own inputs"
        )
    if kind is _TEXT and any(path.suffix.lower() in PAIRS for path in paths):
        if other := [path for path in paths if path.suffix.lower() not in PAIRS]:
            raise SqCpuError(
                f"{other[0]} holds no pairs of texts: give pairs alone, or texts alone"
            )
        return _SINGLE_TEXTS if has.pools else _TEXT_PAIRS
    if not paths and kind not in _SHIPPED_FOR:
        raise SqCpuError(
            f"{subject.name} takes {kind.name}, and none are shipped: give --calib "
            f"{_GIVE[kind.name]}"
        )
    return _DESCRIBED if kind is _IMAGES and subject.decodes else kind
