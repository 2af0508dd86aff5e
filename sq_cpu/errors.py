"""The one exception that sq_cpu raises for bad input, and the one to stop it with."""

__all__ = ["SqCpuError", "Terminated", "first_line"]


class SqCpuError(ValueError):
    """Bad input or an unusable file; the message is one line that names the cause and the fix.

    Characters that a name or a value brings in and that are not printable (line ends, escape
    sequences) are shown as Python writes them.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(map(_visible, message)))


class Terminated(KeyboardInterrupt):
    """SIGTERM, for a handler to raise: it cleans up as Ctrl-C does."""


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def first_line(error: BaseException) -> str:
    """Return the first line that another library's error says, or else its type's name."""
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__
