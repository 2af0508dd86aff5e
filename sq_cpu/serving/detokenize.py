"""Ids to text as they come: no half of a character leaves, and texts that stop are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Stops", "TextStream"]

_REPLACEMENT = "\ufffd"
_CONTEXT = 5
_MOST_HELD = 64


class TextStream:
    """The text of a sequence of ids, a piece a token; the pieces make the text of all of them.

    A piece ends where the decoded text ends in a whole character, so that what a later token
    changes (the rest of a character) has not been given away. Decoding goes on from the piece
    before, as a decoder's first token may lose its space.

    Parameters
    ----------
    decode : ids to text
    prompt : the ids before

    Attributes
    ----------
    held : characters that a later token may change
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = [*prompt[-_CONTEXT:]]
        before = decode(self._ids)
        if before.endswith(_REPLACEMENT):  # half a character is not continued
            self._ids, before = [], ""
        self._read = len(self._ids)
        self._given = len(before)
        self.held = 0

    def push(self, token: int) -> str:
        """Return what the next token adds to the text."""
        self._ids.append(token)
        text = self._decode(self._ids)
        end = max(self._given, len(text.rstrip(_REPLACEMENT)))
        # Bytes that never become a character are let go, or they would be decoded ever again.
        if len(self._ids) - self._read > _MOST_HELD:
            end = len(text)
        piece = text[self._given : end]
        self.held = len(text) - end
        self._given = end
        if end == len(text):
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
            self._given = len(self._decode(self._ids))
        return piece

    def finish(self) -> str:
        """Return what was held back."""
        return self._decode(self._ids)[self._given :]


class Stops:
    """Cuts a text where the first of some texts is complete, however the text comes in pieces.

    Parameters
    ----------
    texts : what stops, and is not part of the text
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = [*texts]
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Return what cannot be part of a text that stops, and whether one was complete."""
        self._held += piece
        found = [(self._held.find(text), text) for text in self._texts]
        ends = [(begin + len(text), begin) for begin, text in found if begin >= 0]
        if ends:
            kept, self._held = self._held[: min(ends)[1]], ""
            return kept, True
        longest = max((self._overlap(text) for text in self._texts), default=0)
        cut = len(self._held) - longest
        kept, self._held = self._held[:cut], self._held[cut:]
        return kept, False

    def _overlap(self, text: str) -> int:
        """Return how many letters at the end of what is held begin a text."""
        most = min(len(text) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(text[:n])), 0)

    def finish(self) -> str:
        """Return what was held back."""
        kept, self._held = self._held, ""
        return kept
