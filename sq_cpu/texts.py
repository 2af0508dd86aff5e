"""The texts that ship with the package: enough to calibrate and to score a language model.

Both are public-domain English; ``data/README.md`` tells where they come from. A file holds
documents, separated by a line with a single form feed. A document begins where a window of the
evaluation protocol begins, so it may start in the middle of a sentence, on a space even: its text
is never stripped, because a tokenizer sees the difference.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

__all__ = ["calibration", "evaluation", "selection"]

_SEPARATOR = "\n\f\n"


def calibration() -> tuple[str, ...]:
    """Return the 16 calibration documents, about 7,500 characters each.

    Returns
    -------
    tuple of str
        Addresses given before 1990 and a part of the Jargon File.
    """
    return _documents("calibration.txt")


def evaluation() -> tuple[str, ...]:
    """Return the 20 evaluation documents, about 7,500 characters each.

    Returns
    -------
    tuple of str
        Addresses given since 1990 and a part of Moby-Dick; nothing in common with `calibration`.
    """
    return _documents("evaluation.txt")


def selection() -> tuple[str, ...]:
    """Return what a search may score while the windows of `evaluation` stay unseen.

    Returns
    -------
    tuple of str
        The second halves of the 20 evaluation documents; windows of 512 tokens come from the first.
    """
    return tuple(document[len(document) // 2 :] for document in evaluation())


@cache
def _documents(name: str) -> tuple[str, ...]:
    text = (files("sq_cpu") / "data" / name).read_text(encoding="utf-8")
    return tuple(text.removesuffix("\n").split(_SEPARATOR))
